# SPDX-License-Identifier: Apache-2.0
"""Packed values of the catalogue: round trips, hostile bytes, headers and names."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec import Profile
from kvstore.errors import (
    ConfigError,
    CorruptRecordError,
    UnsupportedFormatError,
)
from kvstore.layout import ALIGNMENT
from kvstore.native import seal_extent
from kvstore.spec import BlockKey, ModelSpec
from kvstore.tiers.base import Extent
from kvstore.tiers.manifest import StreamHeader
from kvstore.tiers.tables.records import (
    EXTENT_HEADER_NBYTES,
    BlockRecord,
    Entry,
    ExtentHeader,
    StreamState,
    pack_block,
    pack_entry,
    pack_state,
    position_key,
    unpack_block,
    unpack_entry,
    unpack_extent_header,
    unpack_state,
)

SPEC = ModelSpec(
    num_layers=2,
    kv_heads=2,
    key_dim=8,
    value_dim=4,
    dtype="bfloat16",
    key_space="pre",
    architecture="test",
    rope="{}",
    revision="0",
)
HEADER = StreamHeader("lecture", SPEC, 16, Profile.LOSSLESS, "window=64", {"fps": 25.0}, 1.0)
RECORD = BlockRecord(
    num_tokens=16, extent=Extent(0, 4096, 4096), record_nbytes=4000, generation=7, references=0, stamp=7
)
ENTRY = Entry(3, BlockKey(b"k" * 32), 16, 48, 1.5, 2.5, -1)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


def _key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


@given(
    num_tokens=u32, file_id=u32, page=st.integers(0, 2**50), nbytes=st.integers(0, 2**40), numbers=st.tuples(u64, u64)
)
def test_block_records_survive_packing(
    num_tokens: int, file_id: int, page: int, nbytes: int, numbers: tuple[int, int]
) -> None:
    extent_nbytes = -(-(nbytes + 64) // 4096) * 4096
    record = BlockRecord(num_tokens, Extent(file_id, page * 4096, extent_nbytes), nbytes, numbers[0], 5, numbers[1])
    assert unpack_block(pack_block(record)) == record


@given(
    st.builds(
        Entry,
        u32,
        st.binary(min_size=32, max_size=32).map(BlockKey),
        u32,
        u64,
        st.floats(allow_nan=False, allow_infinity=False),
        st.floats(allow_nan=False, allow_infinity=False),
        st.integers(-(2**63), 2**63 - 1),
    )
)
def test_entries_survive_packing(entry: Entry) -> None:
    assert unpack_entry(entry.index, pack_entry(entry)) == entry


@given(st.builds(StreamState, u64, u64, st.binary(max_size=50)))
def test_stream_states_survive_packing(state: StreamState) -> None:
    assert unpack_state(pack_state(state)) == state


def test_the_bytes_are_those_of_the_documented_format() -> None:
    block = "010000001000000000000000000000000010000000000000a00f000000000000" + 2 * "0700000000000000"
    assert pack_block(RECORD).hex() == block
    entry = "0100000010000000" + "6b" * 32 + "3000000000000000000000000000f83f0000000000000440" + "ff" * 8
    assert pack_entry(ENTRY).hex() == entry
    assert pack_state(StreamState(1, 16, b"{}")).hex() == "0100000002000000010000000000000010000000000000007b7d"
    header = _sealed(BlockKey(b"k" * 32), b"\xff" * 32)
    fixed = "4b5658540100000009000000000000002000000000000000" + "6b" * 32
    assert header.hex()[:-8] == fixed + "43aba862", "RFC 3720, B.4: 32 bytes of ones"
    assert unpack_extent_header(header) == ExtentHeader(BlockKey(b"k" * 32), 9, 32, 0x62A8AB43)
    assert position_key(1, 258).hex() == "00000000000000010000000000000102"


def _values() -> list[bytes]:
    header = _sealed(_key(1), bytes(100))
    return [pack_block(RECORD), pack_entry(ENTRY), pack_state(StreamState(1, 16, b"{}")), header]


def _sealed(key: BlockKey, record: bytes) -> bytes:
    """The header of an extent, which native code writes; checks what is behind the record, and behind the extent."""
    room = bytearray(b"x" * (2 * ALIGNMENT))
    room[EXTENT_HEADER_NBYTES : EXTENT_HEADER_NBYTES + len(record)] = record
    assert seal_extent(key, 9, len(record), room) == ALIGNMENT
    assert room[EXTENT_HEADER_NBYTES:ALIGNMENT] == record.ljust(ALIGNMENT - EXTENT_HEADER_NBYTES, b"\0")
    assert room[ALIGNMENT:] == b"x" * ALIGNMENT
    return bytes(room[:EXTENT_HEADER_NBYTES])


def _unpack(kind: int, value: bytes) -> object:
    match kind:
        case 0:
            return unpack_block(value)
        case 1:
            return unpack_entry(0, value)
        case 2:
            return unpack_state(value)
        case _:
            return unpack_extent_header(value)


@pytest.mark.parametrize("kind", range(4))
def test_every_cut_of_a_value_is_recognised(kind: int) -> None:
    value = _values()[kind]
    for length in range(len(value)):
        with pytest.raises(CorruptRecordError):
            _unpack(kind, value[:length])


@pytest.mark.parametrize("kind", range(3))
def test_a_value_that_is_too_long_is_recognised(kind: int) -> None:
    with pytest.raises(CorruptRecordError):
        _unpack(kind, _values()[kind] + b"\0")


@pytest.mark.parametrize("kind", range(3))
def test_a_newer_value_is_unsupported_not_corrupt(kind: int) -> None:
    with pytest.raises(UnsupportedFormatError):
        _unpack(kind, b"\x03" + _values()[kind][1:])


def test_a_block_with_the_version_of_an_objects_body_is_damaged_and_the_other_way_round() -> None:
    body = pack_block(replace(RECORD, num_tokens=0))
    assert unpack_block(body).is_object
    assert not unpack_block(pack_block(RECORD)).is_object
    for value in (b"\x01" + body[1:], b"\x02" + pack_block(RECORD)[1:]):
        with pytest.raises(CorruptRecordError):
            unpack_block(value)


@settings(max_examples=200)
@given(kind=st.integers(0, 3), value=st.binary(max_size=100))
def test_hostile_values_end_in_a_typed_error(kind: int, value: bytes) -> None:
    with suppress(CorruptRecordError, UnsupportedFormatError):
        _unpack(kind, value)


@given(bit=st.integers(0, 64 * 8 - 1))
def test_any_flipped_bit_of_an_extent_header_is_seen(bit: int) -> None:
    value = bytearray(_sealed(_key(1), bytes(100)))
    value[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptRecordError):
        unpack_extent_header(bytes(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        HEADER.to_json()[:-1],
        HEADER.to_json().replace(b'"lossless"', b'"loss"'),
        HEADER.to_json().replace(b'"block_tokens":16', b'"block_tokens":0'),
        HEADER.to_json().replace(b'"lecture"', b'"other"'),
    ],
)
def test_a_damaged_header_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptRecordError):
        StreamHeader.from_json("lecture", data)


@pytest.mark.parametrize("name", ["", "x" * 401, "\ud800"])
def test_a_name_that_cannot_be_a_key_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="stream name"):
        replace(HEADER, name=name)


def test_a_source_that_is_not_json_is_refused() -> None:
    with pytest.raises(ConfigError, match="source"):
        replace(HEADER, source={"fps": float("nan")})


@pytest.mark.parametrize("second", [float("nan"), float("inf"), float("-inf")])
def test_a_span_that_is_no_time_is_refused(second: float) -> None:
    for changed in (replace(ENTRY, start_s=second), replace(ENTRY, end_s=second)):
        with pytest.raises(CorruptRecordError, match="is no time"):
            unpack_entry(0, pack_entry(changed))
