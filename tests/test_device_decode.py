# SPDX-License-Identifier: Apache-2.0
"""Records decoded by warps, byte for byte as the host decodes them: in lock step, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from kvstore.codec import Coding, Profile, Steps
from kvstore.layout import TORCH_DTYPE
from kvstore.tiers.device.decode import Pages
from tests.codec_slots import LATER, make_layout, normal_slot
from tests.device_blocks import GUARD, Block, bits, make_block, rugged_slot, run

ENTROPY_CODED = [Profile.LOSSLESS, Profile.Q8, Profile.Q4, Profile.Q3, Profile.Q2]


def check(block: Block, device: torch.device) -> None:
    keys, values = block.empty(device)
    assert run([block.to(keys, values)], device) == [None]
    for found, wanted in zip((keys, values), block.host(), strict=True):
        assert torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPE))
@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("profile", ENTROPY_CODED)
def test_every_profile_equals_the_host(profile: Profile, is_calibrated: bool, dtype: str, device: torch.device) -> None:
    layout = make_layout(heads=3, key_dim=80, value_dim=37, dtype=dtype, tokens=300)
    block = make_block(profile, layout=layout, num_tokens=300, first_token=0, is_calibrated=is_calibrated)

    wanted = Coding.QUANTISED if profile.is_lossy else Coding.EXPONENT
    assert wanted in {plane.coding for plane in block.info.planes}
    check(block, device)


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("steps", [Steps(40, 40, True), Steps(-60, 127), Steps(24, 17, True), Steps(0, 0)])
def test_every_kind_of_step_equals_the_host(steps: Steps, is_calibrated: bool, device: torch.device) -> None:
    check(make_block(Profile.Q4, is_calibrated=is_calibrated, steps=steps), device)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 17, 33])
@pytest.mark.parametrize("dims", [(1, 1, 3), (5, 63, 64), (1, 65, 128), (2, 130, 256)])
@pytest.mark.parametrize("profile", [Profile.LOSSLESS, Profile.Q8, Profile.Q2])
def test_odd_shapes_equal_the_host(
    profile: Profile, dims: tuple[int, int, int], num_tokens: int, device: torch.device
) -> None:
    heads, key_dim, value_dim = dims
    layout = make_layout(heads=heads, key_dim=key_dim, value_dim=value_dim, tokens=40)
    for first_token in (0, LATER):
        for is_calibrated in (False, True):
            slot = rugged_slot(layout)
            block = make_block(
                profile,
                layout=layout,
                num_tokens=num_tokens,
                first_token=first_token,
                is_calibrated=is_calibrated and profile.is_lossy,
                slot=slot,
            )
            check(block, device)


def test_scales_too_far_apart_for_the_coder_equal_the_host(device: torch.device) -> None:
    layout = make_layout(key_dim=64, value_dim=64, tokens=64)
    slot = normal_slot(layout)
    layout.values(slot)[:, :, ::7] *= 2.0**20
    block = make_block(Profile.Q4, layout=layout, num_tokens=64, slot=slot)

    assert 255 in {plane.scale_class for plane in block.info.planes}
    check(block, device)


def test_raw_planes_are_copied(device: torch.device) -> None:
    check(make_block(Profile.RAW), device)


@pytest.mark.parametrize("order", ["NHD", "HND", "fused"])
def test_rows_go_where_the_strides_say_and_nowhere_else(order: str, device: torch.device) -> None:
    layout = make_layout(heads=3, key_dim=64, value_dim=64, tokens=50)
    block = make_block(Profile.Q4, layout=layout, num_tokens=50)
    if order == "NHD":  # [layers, tokens, heads, dim]
        whole = torch.full((2, 2, 60, 3, 64), GUARD, dtype=torch.bfloat16, device=device)
        keys, values = whole[0, :, 5:55].transpose(1, 2), whole[1, :, 5:55].transpose(1, 2)
    elif order == "HND":
        whole = torch.full((2, 2, 3, 60, 64), GUARD, dtype=torch.bfloat16, device=device)
        keys, values = whole[0, :, :, 5:55], whole[1, :, :, 5:55]
    else:  # an odd number of elements between K and V: no two may be written at once
        whole = torch.full((2, 3, 60, 131), GUARD, dtype=torch.bfloat16, device=device)
        keys, values = whole[:, :, 5:55, 1:65], whole[:, :, 5:55, 66:130]

    assert run([block.to(keys, values)], device) == [None]

    for found, wanted in zip((keys, values), block.host(), strict=True):
        assert torch.equal(bits(found), bits(wanted))
        found.fill_(GUARD)
    assert bool((whole == GUARD).all())


def test_pages_are_filled_through_the_block_table(device: torch.device) -> None:
    layout = make_layout(heads=3, key_dim=64, value_dim=32, tokens=50)
    block = make_block(Profile.Q3, layout=layout, num_tokens=50, first_token=0)
    page_tokens, slots, first_row = 16, [7, 0, 3, 9], 11
    keys, values = (
        torch.full((2, 10, page_tokens, 3, dim), GUARD, dtype=torch.bfloat16, device=device).transpose(2, 3)
        for dim in (64, 32)
    )

    assert run([block.to(keys, values, pages=Pages(page_tokens, slots, first_row))], device) == [None]

    for found, wanted in zip((keys, values), block.host(), strict=True):
        rows = found[:, slots].transpose(1, 2).flatten(2, 3)[:, :, first_row : first_row + 50]
        assert torch.equal(bits(rows), bits(wanted))
        for row in range(first_row, first_row + 50):
            found[:, slots[row // page_tokens], :, row % page_tokens] = GUARD
        assert bool((found == GUARD).all())


def test_layers_can_be_decoded_alone(device: torch.device) -> None:
    layout = make_layout(layers=5, heads=2, key_dim=64, value_dim=64, tokens=40)
    block = make_block(Profile.Q4, layout=layout, num_tokens=40, is_calibrated=True)
    keys, values = (each[1:4] for each in block.empty(device))

    assert run([block.to(keys, values, layers=range(1, 4))], device) == [None]

    for found, wanted in zip((keys, values), block.host(range(1, 4)), strict=True):
        assert torch.equal(bits(found), bits(wanted))
