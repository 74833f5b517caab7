# SPDX-License-Identifier: Apache-2.0
"""Lossy profiles: how far elements may move, what stays exact, and what is never touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.codec import Codec, Coding, Profile, Steps
from kvstore.errors import ConfigError
from kvstore.layout import TORCH_DTYPE
from tests.codec_slots import (
    DTYPES,
    LARGEST,
    LATER,
    LOSSY,
    MULTS,
    any_bits_slot,
    encoded,
    guarded_slot,
    make_layout,
    normal_slot,
)


def _by_deviation(keys: Tensor) -> Tensor:
    """How much larger than its head's a channel's step is: by the deviation to the power -3/4, within three octaves."""
    sigma = (keys - keys.mean(2, keepdim=True)).square().mean(2, keepdim=True).sqrt()
    rms = sigma.square().mean(3, keepdim=True).sqrt()
    return torch.where(sigma > 0, rms / sigma, 16.0).pow(0.75).clamp(0.1, 8.0)


@settings(max_examples=60, deadline=None)
@given(
    profile=st.sampled_from(LOSSY),
    dtype=st.sampled_from(DTYPES),
    heads=st.integers(1, 3),
    dim=st.integers(5, 70),
    num_tokens=st.integers(1, 40),
    has_channel_values=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_lossy_profiles_stay_within_half_a_step_and_the_rounding_of_the_dtype(
    profile: Profile, dtype: str, heads: int, dim: int, num_tokens: int, has_channel_values: bool, seed: int
) -> None:
    layout = make_layout(heads=heads, key_dim=dim, value_dim=dim, dtype=dtype, tokens=40)
    slot = normal_slot(layout, seed)
    steps = Steps(MULTS[profile], MULTS[profile], has_channel_values)
    codec = Codec(layout, profile, steps=steps)
    destination = guarded_slot(layout)

    codec.decode(memoryview(encoded(codec, slot, num_tokens, LATER)), destination, num_tokens=num_tokens)

    finfo = torch.finfo(TORCH_DTYPE[dtype])
    for part, is_key in ((layout.keys, True), (layout.values, False)):
        wanted = part(slot)[:, :, :num_tokens].double()
        found = part(destination)[:, :, :num_tokens].double()
        # The largest step that any axis can have: of the whole head's, the largest row's or channel's rms.
        rms = torch.maximum(wanted.square().mean((-1, -2)), wanted.square().mean(-1).amax(-1)).sqrt()
        rms = torch.maximum(rms, wanted.square().mean(-2).amax(-1).sqrt())
        step = 1.15 * 2 ** (-MULTS[profile] / 8) * rms[..., None, None]
        if is_key:
            step = step * _by_deviation(wanted)
        assert bool(((found - wanted).abs() <= step / 2 + found.abs() * finfo.eps + finfo.smallest_normal).all())


@pytest.mark.parametrize("profile", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), "largest"])
def test_what_the_alphabet_cannot_hold_is_exact(profile: Profile, dtype: str, bad: float | str) -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, dtype=dtype, tokens=64)
    slot = normal_slot(layout)
    value = LARGEST[dtype] if isinstance(bad, str) else bad
    for view in (layout.keys(slot), layout.values(slot)):
        view[1, 1, 15, 31] = value
    codec = Codec(layout, profile)
    destination = guarded_slot(layout)
    record = encoded(codec, slot, 64, LATER)

    codec.decode(memoryview(record), destination, num_tokens=64)

    assert {plane.coding for plane in Codec.probe(record).planes[::3]} == {Coding.QUANTISED}
    for part in (layout.keys, layout.values):
        exact, found = part(slot)[1, 1, 15, 31:32], part(destination)[1, 1, 15, 31:32]
        assert torch.equal(found.view(torch.uint8), exact.view(torch.uint8))
        assert bool(part(destination)[0].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("profile", LOSSY)
def test_any_bits_are_taken_and_what_is_finite_stays_finite(dtype: str, profile: Profile) -> None:
    layout = make_layout(heads=2, key_dim=33, value_dim=64, dtype=dtype, tokens=40)
    slot = any_bits_slot(layout, 4)
    codec = Codec(layout, profile)
    destination = guarded_slot(layout)

    codec.decode(memoryview(encoded(codec, slot, 40, LATER)), destination, num_tokens=40)

    for part in (layout.keys, layout.values):
        special = ~part(slot)[:, :, :40].isfinite()
        assert torch.equal(~part(destination)[:, :, :40].isfinite(), special)


@pytest.mark.parametrize("profile", LOSSY)
def test_the_first_rows_of_a_stream_are_exact(profile: Profile) -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, tokens=32)
    slot = normal_slot(layout)
    codec = Codec(layout, profile)
    destination = guarded_slot(layout)

    codec.decode(memoryview(encoded(codec, slot, 32, 0)), destination, num_tokens=32)

    for view in (layout.keys, layout.values):
        assert torch.equal(view(destination)[:, :, :4], view(slot)[:, :, :4])
        assert not torch.equal(view(destination)[:, :, 4:], view(slot)[:, :, 4:])


@pytest.mark.parametrize("profile", LOSSY)
def test_rows_of_zeros_stay_zeros(profile: Profile) -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, tokens=32)
    slot = normal_slot(layout)
    layout.values(slot)[:, 0] = 0
    layout.values(slot)[:, 1, 7:9] = 0
    layout.keys(slot)[:, 1] = 0
    codec = Codec(layout, profile)
    destination = guarded_slot(layout)

    codec.decode(memoryview(encoded(codec, slot, 32, LATER)), destination, num_tokens=32)

    assert not layout.values(destination)[:, 0].any()
    assert not layout.values(destination)[:, 1, 7:9].any()
    assert not layout.keys(destination)[:, 1].any()


def test_rows_whose_scales_lie_far_apart_are_kept() -> None:
    layout = make_layout(heads=2, key_dim=64, value_dim=64, tokens=32)
    slot = normal_slot(layout)
    layout.values(slot)[:, :, ::2] *= 2.0**-20
    codec = Codec(layout, Profile.Q8)
    destination = guarded_slot(layout)
    record = encoded(codec, slot, 32, LATER)

    codec.decode(memoryview(record), destination, num_tokens=32)

    assert Codec.probe(record).planes[1].scale_class == 255
    small, found = (layout.values(each)[:, :, ::2].double() for each in (slot, destination))
    assert bool(((small - found).square().mean(-1) < 0.002 * small.square().mean(-1)).all())


def test_a_coarser_profile_is_smaller() -> None:
    layout = make_layout(heads=3, key_dim=64, value_dim=64, tokens=128)
    slot = normal_slot(layout)
    sizes = [
        len(encoded(Codec(layout, profile), slot, 128, LATER)) for profile in Profile if profile is not Profile.ZSTD
    ]

    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < layout.slot_nbytes / 6.5


def test_steps_belong_to_lossy_profiles() -> None:
    with pytest.raises(ConfigError):
        Codec(make_layout(), Profile.LOSSLESS, steps=Steps(8, 8))
    with pytest.raises(ConfigError):
        Steps(128, 0)
