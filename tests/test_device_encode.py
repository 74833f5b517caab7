# SPDX-License-Identifier: Apache-2.0
"""Blocks encoded by warps, byte for byte as the host encodes them: in lock step, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.codec import Codec, Coding, Profile, Steps
from kvstore.errors import ConfigError, ShapeError
from kvstore.layout import TORCH_DTYPE, BlockLayout
from kvstore.native import build_info
from kvstore.tiers.device.decode import Pages
from kvstore.tiers.device.encode import DeviceBlock, encode_on_device
from tests.codec_slots import LATER, fitted, make_layout, normal_slot
from tests.device_blocks import GUARD, Block, make_block, rugged_slot

LOSSY = [profile for profile in Profile if profile.is_lossy]


def run(blocks: list[DeviceBlock], device: torch.device) -> list[bytes | None]:
    if device.type == "cpu":
        return encode_on_device(blocks)
    if build_info()["cuda_devices"] == 0:
        pytest.skip("the native part sees no device, or was built without")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return encode_on_device(blocks, stream)


def rows_of(layout: BlockLayout, slot: Tensor, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    keys, values = (view(slot)[:, :, :num_tokens].to(device) for view in (layout.keys, layout.values))
    return keys, values


def check(
    profile: Profile,
    device: torch.device,
    layout: BlockLayout,
    num_tokens: int,
    first_token: int = LATER,
    steps: Steps | None = None,
    slot: Tensor | None = None,
) -> Block:
    """The record equals the host's, or one of the host's planes is of another coding."""
    slot = rugged_slot(layout) if slot is None else slot
    block = make_block(
        profile,
        layout=layout,
        num_tokens=num_tokens,
        first_token=first_token,
        is_calibrated=True,
        steps=steps,
        slot=slot,
    )
    keys, values = rows_of(layout, slot, num_tokens, device)
    (found,) = run([DeviceBlock(block.codec, num_tokens, first_token, keys, values)], device)
    if all(plane.coding is Coding.QUANTISED for plane in block.info.planes):
        assert found == block.record
    else:
        assert found is None
    return block


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPE))
@pytest.mark.parametrize("profile", LOSSY)
@pytest.mark.parametrize("first_token", [0, LATER])
def test_every_profile_equals_the_host(profile: Profile, dtype: str, first_token: int, device: torch.device) -> None:
    layout = make_layout(heads=3, key_dim=80, value_dim=37, dtype=dtype, tokens=300)

    block = check(profile, device, layout, 300, first_token)

    assert {plane.coding for plane in block.info.planes} == {Coding.QUANTISED}


@pytest.mark.parametrize(
    "steps", [Steps(40, 40, True), Steps(-60, 60), Steps(24, 17, True), Steps(0, 0), Steps(17, 33)]
)
def test_every_kind_of_step_equals_the_host(steps: Steps, device: torch.device) -> None:
    check(Profile.Q4, device, make_layout(heads=3, key_dim=80, value_dim=37, tokens=150), 150, steps=steps)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 17, 33])
@pytest.mark.parametrize("dims", [(1, 1, 3), (5, 63, 64), (1, 65, 128), (2, 130, 256)])
@pytest.mark.parametrize("profile", [Profile.Q8, Profile.Q2])
def test_odd_shapes_equal_the_host(
    profile: Profile, dims: tuple[int, int, int], num_tokens: int, device: torch.device
) -> None:
    heads, key_dim, value_dim = dims
    layout = make_layout(heads=heads, key_dim=key_dim, value_dim=value_dim, tokens=40)
    for first_token in (0, LATER):
        check(profile, device, layout, num_tokens, first_token)


def test_blocks_of_many_segments_equal_the_host(device: torch.device) -> None:
    block = check(Profile.Q3, device, make_layout(layers=1, heads=9, key_dim=64, value_dim=128, tokens=270), 270)

    assert block.info.segment_tokens < 270
    assert block.info.planes[1].segment_heads < 9


def test_scales_too_far_apart_for_the_coder_equal_the_host(device: torch.device) -> None:
    layout = make_layout(key_dim=64, value_dim=64, tokens=64)
    slot = normal_slot(layout)
    layout.values(slot)[:, :, ::7] *= 2.0**20

    block = check(Profile.Q4, device, layout, 64, slot=slot)

    assert 255 in {plane.scale_class for plane in block.info.planes}


def test_a_block_that_does_not_shrink_is_left_to_the_host(device: torch.device) -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, tokens=40)
    slot = normal_slot(layout)
    layout.keys(slot)[1] = float("nan")

    block = check(Profile.Q4, device, layout, 40, slot=slot)

    assert Coding.QUANTISED not in {block.info.planes[2].coding}


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPE))
def test_numbers_at_the_ends_of_their_range_equal_the_host(dtype: str, device: torch.device) -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, dtype=dtype, tokens=60)
    slot = normal_slot(layout)
    info = torch.finfo(TORCH_DTYPE[dtype])
    chance = torch.Generator().manual_seed(0)
    for view in (layout.keys(slot), layout.values(slot)):
        for value in (info.max, info.min, info.tiny, info.smallest_normal / 2, -0.0):
            view[torch.rand(view.shape, generator=chance) < 0.01] = value

    for steps in (None, Steps(30, 30), Steps(-128, 127)):
        check(Profile.Q8, device, layout, 60, steps=steps, slot=slot)


def test_a_batch_of_blocks_comes_from_pages_of_an_engine(device: torch.device) -> None:
    layout = make_layout(heads=3, key_dim=64, value_dim=32, tokens=50)
    page_tokens, first_row = 16, 11
    tables = [[7, 0, 3, 9], [1, 2, 5, 4]]
    caches = [torch.full((2, 10, page_tokens, 3, dim), GUARD, dtype=torch.bfloat16).transpose(2, 3) for dim in (64, 32)]
    made = []
    for seed, slots in enumerate(tables):
        slot = rugged_slot(layout, seed)
        made.append(make_block(Profile.Q4, layout=layout, num_tokens=50, is_calibrated=True, slot=slot))
        for cache, view in zip(caches, (layout.keys, layout.values), strict=True):
            for token in range(50):
                row = first_row + token
                cache[:, slots[row // page_tokens], :, row % page_tokens] = view(slot)[:, :, token]
    keys, values = (cache.to(device) for cache in caches)
    blocks = [
        DeviceBlock(block.codec, 50, LATER, keys, values, Pages(page_tokens, slots, first_row))
        for block, slots in zip(made, tables, strict=True)
    ]

    assert run(blocks, device) == [block.record for block in made]


def test_what_only_the_host_encodes_is_refused(device: torch.device) -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, tokens=40)
    slot = normal_slot(layout)
    keys, values = rows_of(layout, slot, 40, device)
    for profile, is_calibrated in ((Profile.LOSSLESS, False), (Profile.Q4, False)):
        codec = make_block(profile, layout=layout, num_tokens=40, is_calibrated=is_calibrated, slot=slot).codec
        with pytest.raises(ConfigError, match="with a calibration"):
            run([DeviceBlock(codec, 40, 0, keys, values)], device)


def test_what_is_coded_in_bases_is_left_to_the_host(device: torch.device) -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, tokens=40)
    slot = normal_slot(layout)
    calibration = fitted([(layout.keys(slot), layout.values(slot))] * 13, with_bases=True)
    assert calibration.has_bases
    keys, values = rows_of(layout, slot, 40, device)

    with pytest.raises(ConfigError, match="bases"):
        run([DeviceBlock(Codec(layout, Profile.PCA, calibration), 40, LATER, keys, values)], device)


def test_rows_that_are_no_block_are_refused(device: torch.device) -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, tokens=40)
    slot = normal_slot(layout)
    codec = make_block(Profile.Q4, layout=layout, num_tokens=40, is_calibrated=True, slot=slot).codec
    keys, values = rows_of(layout, slot, 40, device)

    for wrong in (
        DeviceBlock(codec, 41, 0, keys, values),
        DeviceBlock(codec, 40, -1, keys, values),
        DeviceBlock(codec, 40, 0, keys[:1], values),
        DeviceBlock(codec, 40, 0, keys, values.float()),
        DeviceBlock(codec, 40, 0, keys, values, Pages(16, [])),
        DeviceBlock(codec, 40, 0, keys[:, None], values[:, None], Pages(40, [1])),
    ):
        with pytest.raises(ShapeError):
            run([wrong], device)
