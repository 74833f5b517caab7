# SPDX-License-Identifier: Apache-2.0
"""Steps of calibrated channels, and keys that a lossy profile stores exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.calibration import Calibration, calibrate
from kvstore.codec import Codec, Coding, Profile, Steps
from kvstore.layout import BlockLayout
from kvstore.moments import Moments
from kvstore.spec import ModelSpec

LAYERS, HEADS, DIM, TOKENS = 2, 2, 40, 96
LAYOUT = BlockLayout(ModelSpec(LAYERS, HEADS, DIM, DIM, "float32", "pre", "test", "{}", "0"), TOKENS)
LOSSY = [Profile.Q8, Profile.Q4, Profile.Q3, Profile.Q2]


def _slot() -> Tensor:
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    chance = torch.Generator().manual_seed(0)
    for part in (LAYOUT.keys, LAYOUT.values):
        part(slot).copy_(torch.randn(LAYERS, HEADS, TOKENS, DIM, generator=chance))
    return slot


def _calibration(key_step: Tensor, value_step: Tensor) -> Calibration:
    moments = Moments(LAYERS, HEADS, DIM, DIM)
    moments.add(LAYOUT.keys(_slot()), LAYOUT.values(_slot()))
    steps = (key_step.to(torch.int8), value_step.to(torch.int8))
    return calibrate(moments, steps, min_tokens=1)


def _errors(codec: Codec) -> tuple[Tensor, Tensor]:
    """Rms error of keys and values, `[layers, heads, dim]`."""
    record = bytearray(codec.bound(TOKENS))
    codec.encode(_slot(), TOKENS, 1, record)
    found = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    codec.decode(record, found, num_tokens=TOKENS)
    return tuple(  # type: ignore[return-value]
        (part(found) - part(_slot())).square().mean(2).sqrt() for part in (LAYOUT.keys, LAYOUT.values)
    )


def _offsets(kind: str) -> Tensor:
    """Octaves by which channels are coarser: all, every second, or those of one head."""
    octaves = torch.zeros(LAYERS, HEADS, DIM)
    if kind == "channels":
        octaves[:, :, ::2] = 1
        octaves[:, :, 1::2] = -1
    else:
        octaves[:, 0], octaves[:, 1] = 1, -1
    return octaves


@pytest.mark.parametrize("has_channel_values", [False, True])
@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_a_channel_errs_as_much_more_as_its_step_is_larger(kind: str, has_channel_values: bool) -> None:
    steps = Steps(16, 16, has_channel_values)
    octaves = _offsets(kind)
    plain = _errors(Codec(LAYOUT, Profile.Q4, _calibration(0 * octaves, 0 * octaves), steps))
    weighted = _errors(Codec(LAYOUT, Profile.Q4, _calibration(8 * octaves, 8 * octaves), steps))
    for before, after in zip(plain, weighted, strict=True):
        torch.testing.assert_close((after / before).log2(), octaves, rtol=0, atol=0.5)


@pytest.mark.parametrize("profile", LOSSY)
def test_the_widest_steps_there_can_be_lose_no_element(profile: Profile) -> None:
    octaves = torch.full((LAYERS, HEADS, DIM), 127.0)
    octaves[:, :, ::3] = -128.0
    keys, values = _errors(Codec(LAYOUT, profile, _calibration(octaves, octaves)))
    assert bool(keys.isfinite().all())
    # Steps this fine leave nothing to the alphabet: such elements are exceptions, and exact.
    assert float(keys[:, :, ::3].max()) < 1e-3
    assert float(values[:, :, ::3].max()) < 1e-3


@pytest.mark.parametrize("profile", LOSSY)
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_exact_keys_are_exact_and_values_are_as_they_would_be_anyway(profile: Profile, is_calibrated: bool) -> None:
    zeros = torch.zeros(LAYERS, HEADS, DIM)
    calibration = _calibration(zeros, zeros) if is_calibrated else None
    codec = Codec(LAYOUT, profile, calibration, exact_keys=True)
    keys, values = _errors(codec)
    assert float(keys.max()) == 0.0
    assert torch.equal(values, _errors(Codec(LAYOUT, profile, calibration))[1])
    record = bytearray(codec.bound(TOKENS))
    codec.encode(_slot(), TOKENS, 1, record)
    info = codec.probe(record)
    assert info.profile is profile
    assert {plane.coding for plane in info.planes[::2]} <= {Coding.EXPONENT, Coding.RAW}
    assert {plane.coding for plane in info.planes[1::2]} == {Coding.QUANTISED}
