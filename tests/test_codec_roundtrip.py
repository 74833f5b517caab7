# SPDX-License-Identifier: Apache-2.0
"""Whole records: what goes in comes out, exactly or within the promised error, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec import Codec, Coding, Profile
from kvstore.errors import ShapeError, SpecMismatchError
from kvstore.layout import BlockLayout
from tests.codec_slots import (
    DTYPES,
    EXACT,
    any_bits_slot,
    encoded,
    expected_slot,
    guarded_slot,
    make_layout,
    normal_slot,
)


@settings(max_examples=60, deadline=None)
@given(
    profile=st.sampled_from(EXACT),
    dtype=st.sampled_from(DTYPES),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    tokens=st.tuples(st.integers(1, 33), st.integers(0, 32)),
    is_normal=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_exact_profiles_give_back_every_bit_and_touch_no_other_byte(
    profile: Profile,
    dtype: str,
    layers: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    tokens: tuple[int, int],
    is_normal: bool,
    seed: int,
) -> None:
    num_tokens, spare = tokens
    layout = make_layout(
        layers=layers, heads=heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype, tokens=num_tokens + spare
    )
    slot = normal_slot(layout, seed) if is_normal else any_bits_slot(layout, seed)
    codec = Codec(layout, profile)
    destination = guarded_slot(layout)

    codec.decode(memoryview(encoded(codec, slot, num_tokens)), destination, num_tokens=num_tokens)

    assert torch.equal(destination, expected_slot(layout, slot, num_tokens))


@pytest.mark.parametrize("profile", list(Profile))
def test_the_header_says_what_the_record_holds(profile: Profile) -> None:
    layout = make_layout(layers=3, heads=2, key_dim=8, value_dim=24, dtype="float16", tokens=16)
    codec = Codec(layout, profile)

    record = encoded(codec, normal_slot(layout), 11, first_token=2**40 + 3)
    info = Codec.probe(record)

    assert (info.num_layers, info.kv_heads, info.key_dim, info.value_dim) == (3, 2, 8, 24)
    assert (info.version, info.profile, info.dtype) == ((1, 0), profile, "float16")
    assert (info.num_tokens, info.first_token, info.total_nbytes) == (11, 2**40 + 3, len(record))
    assert len(info.planes) == 6
    alone = Codec.probe(record[: info.header_nbytes])
    assert (alone, alone.planes) == (info, info.planes)


def test_lossless_shrinks_values_as_models_have_them() -> None:
    layout = make_layout(layers=2, heads=4, key_dim=64, value_dim=64, tokens=64)
    record = encoded(Codec(layout, Profile.LOSSLESS), normal_slot(layout), 64)

    assert len(record) < 0.72 * layout.slot_nbytes
    assert {plane.coding for plane in Codec.probe(record).planes} == {Coding.EXPONENT}


def test_planes_that_do_not_shrink_are_stored_raw_within_the_bound() -> None:
    layout = make_layout(heads=3, key_dim=33, value_dim=33, tokens=16)
    codec = Codec(layout, Profile.LOSSLESS)
    record = encoded(codec, any_bits_slot(layout, 1), 16)

    assert len(record) == codec.bound(16)
    assert {plane.coding for plane in Codec.probe(record).planes} == {Coding.RAW}


def test_a_bit_exact_codec_does_not_answer_with_a_lossy_record() -> None:
    layout = make_layout()
    record = encoded(Codec(layout, Profile.Q8), normal_slot(layout), 16)

    with pytest.raises(SpecMismatchError, match="lossy"):
        Codec(layout, Profile.LOSSLESS).decode(memoryview(record), guarded_slot(layout), num_tokens=16)


@pytest.mark.parametrize(
    "other",
    [
        make_layout(layers=1),
        make_layout(heads=1),
        make_layout(key_dim=4),
        make_layout(value_dim=4),
        make_layout(dtype="float16"),
        make_layout(dtype="float32"),
    ],
)
def test_a_record_of_another_layout_is_refused(other: BlockLayout) -> None:
    layout = make_layout()
    record = encoded(Codec(other, Profile.RAW), normal_slot(other), 16)
    destination = guarded_slot(layout)

    with pytest.raises(SpecMismatchError):
        Codec(layout, Profile.RAW).decode(memoryview(record), destination, num_tokens=16)
    assert torch.equal(destination, guarded_slot(layout))


def test_a_record_fits_slots_with_more_room_but_not_with_less() -> None:
    small, large = make_layout(tokens=8), make_layout(tokens=32)
    slot = normal_slot(small)
    record = encoded(Codec(small, Profile.LOSSLESS), slot, 8)
    destination = guarded_slot(large)

    Codec(large, Profile.LOSSLESS).decode(memoryview(record), destination, num_tokens=8)

    assert torch.equal(large.keys(destination)[:, :, :8], small.keys(slot))
    tiny = make_layout(tokens=7)
    with pytest.raises(ShapeError):
        Codec(tiny, Profile.LOSSLESS).decode(memoryview(record), guarded_slot(tiny), num_tokens=8)


@pytest.mark.parametrize("num_tokens", [-1, 0, 17])
def test_token_counts_outside_the_slot_are_refused(num_tokens: int) -> None:
    layout = make_layout()
    codec = Codec(layout, Profile.RAW)

    with pytest.raises(ShapeError):
        codec.bound(num_tokens)
    with pytest.raises(ShapeError):
        codec.encode(normal_slot(layout), num_tokens, 0, bytearray(1 << 16))


@pytest.mark.parametrize("profile", list(Profile))
def test_too_small_an_output_is_refused(profile: Profile) -> None:
    layout = make_layout(key_dim=32, value_dim=32)
    codec = Codec(layout, profile)
    needed = len(encoded(codec, normal_slot(layout), 16))
    out = bytearray(needed - 1)

    with pytest.raises(ShapeError):
        codec.encode(normal_slot(layout), 16, 0, out)


def test_slots_and_outputs_of_the_wrong_kind_are_refused() -> None:
    layout = make_layout()
    codec = Codec(layout, Profile.RAW)
    out = bytearray(codec.bound(16))

    for slot in (torch.zeros(layout.slot_nbytes - 1, dtype=torch.uint8), torch.zeros(layout.slot_nbytes)):
        with pytest.raises(ShapeError):
            codec.encode(slot, 16, 0, out)
    with pytest.raises(ShapeError):
        codec.encode(normal_slot(layout), 16, 0, bytes(out))
    with pytest.raises(ShapeError):
        codec.encode(normal_slot(layout), 16, -1, out)
