# SPDX-License-Identifier: Apache-2.0
"""Layer ranges: decoded alone they equal the same part of the whole, and need only their own bytes."""

from __future__ import annotations

import pytest
import torch

from kvstore.codec import Codec, Profile, plane_span
from kvstore.errors import CorruptRecordError, ShapeError
from kvstore.layout import BlockLayout
from kvstore.spec import ModelSpec

LAYERS = 5
TOKENS = 13
LAYOUT = BlockLayout(ModelSpec(LAYERS, 2, 24, 16, "bfloat16", "pre", "llama", "{}", "0"), 16)
GUARDED = torch.full((LAYOUT.slot_nbytes,), 0x5A, dtype=torch.uint8)
RANGES = [range(first, end) for first in range(LAYERS) for end in range(first + 1, LAYERS + 1)]


def make_record(profile: Profile) -> bytes:
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    for view in (LAYOUT.keys(slot), LAYOUT.values(slot)):
        view.copy_(torch.randn(view.shape, generator=generator))
    codec = Codec(LAYOUT, profile)
    out = bytearray(codec.bound(TOKENS))
    return bytes(out[: codec.encode(slot, TOKENS, 0, out)])


def expected(profile: Profile, layers: range) -> torch.Tensor:
    """A guarded slot with those layers of the whole decode."""
    whole = GUARDED.clone()
    Codec(LAYOUT, profile).decode(memoryview(make_record(profile)), whole, num_tokens=TOKENS)
    slot = GUARDED.clone()
    for view in (LAYOUT.keys, LAYOUT.values):
        view(slot)[layers.start : layers.stop] = view(whole)[layers.start : layers.stop]
    return slot


@pytest.mark.parametrize("profile", list(Profile))
@pytest.mark.parametrize("layers", RANGES, ids=str)
def test_a_layer_range_equals_that_part_of_the_whole(profile: Profile, layers: range) -> None:
    slot = GUARDED.clone()

    Codec(LAYOUT, profile).decode(memoryview(make_record(profile)), slot, num_tokens=TOKENS, layers=layers)

    assert torch.equal(slot, expected(profile, layers))


@pytest.mark.parametrize("profile", list(Profile))
@pytest.mark.parametrize("layers", RANGES, ids=str)
def test_a_layer_range_needs_only_its_own_bytes(profile: Profile, layers: range) -> None:
    record = make_record(profile)
    info = Codec.probe(record)
    offset, nbytes = plane_span(info, layers)
    slot = GUARDED.clone()

    part = record[offset : offset + nbytes]
    Codec(LAYOUT, profile).decode_planes(info, part, offset, slot, layers=layers)

    assert torch.equal(slot, expected(profile, layers))


def test_the_span_of_all_layers_ends_with_the_record() -> None:
    record = make_record(Profile.LOSSLESS)
    info = Codec.probe(record)

    assert plane_span(info, range(LAYERS)) == (info.header_nbytes, len(record) - info.header_nbytes)


@pytest.mark.parametrize("layers", [range(0), range(2, 2), range(4, 6), range(-1, 2), range(0, 4, 2), range(3, 1, -1)])
def test_ranges_that_are_not_a_run_of_layers_are_refused(layers: range) -> None:
    record = make_record(Profile.RAW)

    with pytest.raises(ShapeError):
        plane_span(Codec.probe(record), layers)
    with pytest.raises(ShapeError):
        Codec(LAYOUT, Profile.RAW).decode(memoryview(record), GUARDED.clone(), num_tokens=TOKENS, layers=layers)


@pytest.mark.parametrize("profile", list(Profile))
def test_damage_outside_the_range_is_not_looked_at_and_inside_is_named(profile: Profile) -> None:
    record = bytearray(make_record(profile))
    info = Codec.probe(record)
    record[info.planes[2 * 3 + 1].offset] ^= 1
    slot = GUARDED.clone()
    codec = Codec(LAYOUT, profile)

    codec.decode(memoryview(record), slot, num_tokens=TOKENS, layers=range(3))
    assert torch.equal(slot, expected(profile, range(3)))
    with pytest.raises(CorruptRecordError, match="V of layer 3"):
        codec.decode(memoryview(record), slot, num_tokens=TOKENS, layers=range(3, 4))
    assert torch.equal(slot, expected(profile, range(3)))


def test_data_that_begins_after_or_ends_before_the_range_is_refused() -> None:
    record = make_record(Profile.LOSSLESS)
    info = Codec.probe(record)
    offset, nbytes = plane_span(info, range(1, 3))
    codec = Codec(LAYOUT, Profile.LOSSLESS)

    with pytest.raises(ShapeError):
        codec.decode_planes(info, record[offset + 1 :], offset + 1, GUARDED.clone(), layers=range(1, 3))
    with pytest.raises(CorruptRecordError, match="cut off"):
        codec.decode_planes(info, record[offset : offset + nbytes - 1], offset, GUARDED.clone(), layers=range(1, 3))
