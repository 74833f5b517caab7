# SPDX-License-Identifier: Apache-2.0
"""Segments as bytes: there and back, other bytes refused, and an index that is loaded instead of built."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import CorruptRecordError, ShapeError, UnsupportedFormatError
from kvstore.native import crc32c
from kvstore.retrieval.index.byte_rows import ByteCoding
from kvstore.retrieval.index.coding import Coding
from kvstore.retrieval.index.float_rows import FLOAT_DTYPES, FloatCoding
from kvstore.retrieval.index.packing import pack, unpack
from kvstore.retrieval.index.segment import Segment
from kvstore.retrieval.index.segmented import SegmentedIndex

CODINGS: list[Coding] = [ByteCoding(), *map(FloatCoding, FLOAT_DTYPES)]
HEADER_NBYTES = 40
Mutation = tuple[int, int]


def index_of(coding: Coding, rows: int, removed: list[int], width: int = 10, seed: int = 0) -> SegmentedIndex:
    index = SegmentedIndex(2, width, coding, 32)
    index.add(torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed)))
    index.remove(torch.tensor(removed, dtype=torch.int64))
    return index


def resealed(data: bytes) -> bytes:
    """The same bytes with the checksum that fits them: what a malicious writer would store."""
    header, payload = data[:HEADER_NBYTES], data[HEADER_NBYTES + 4 :]
    return header + struct.pack("<I", crc32c(payload, crc32c(header))) + payload


def same(one: Segment, other: Segment) -> bool:
    return pack(one) == pack(other)


@settings(max_examples=40, deadline=None)
@given(
    coding=st.sampled_from(CODINGS),
    rows=st.integers(0, 140),
    removed=st.sets(st.integers(0, 139)),
    width=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_an_index_loaded_from_bytes_scores_as_the_one_that_was_built(
    coding: Coding, rows: int, removed: set[int], width: int, seed: int
) -> None:
    built = index_of(coding, rows, [row for row in removed if row < rows], width, seed)
    loaded = SegmentedIndex(2, width, coding, 32)
    loaded.load([unpack(pack(segment)) for segment in built.dump()], built.num_rows)
    more, queries = torch.randn(2, 50, width), torch.randn(2, 3, width)

    assert loaded.num_rows == built.num_rows
    assert torch.equal(loaded.scores(queries), built.scores(queries))
    for index in (built, loaded):
        index.add(more)
    assert torch.equal(loaded.scores(queries), built.scores(queries))
    assert [pack(segment) for segment in loaded.dump()] == [pack(segment) for segment in built.dump()]


@pytest.mark.parametrize("coding", CODINGS)
def test_any_flipped_bit_cut_or_addition_is_found(coding: Coding) -> None:
    segment = index_of(coding, 32, [3, 5]).dump()[0]
    data = pack(segment)
    assert same(unpack(data), segment)
    generator = random.Random(0)
    for bit in [*range(8 * (HEADER_NBYTES + 4)), *generator.sample(range(8 * len(data)), 300)]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecordError):
            unpack(damaged)
    for count in [*range(60), *generator.sample(range(len(data)), 50)]:
        with pytest.raises(CorruptRecordError):
            unpack(data[:count])
    with pytest.raises(CorruptRecordError):
        unpack(data + b"\0")


@settings(max_examples=300, deadline=None)
@given(
    coding=st.sampled_from(CODINGS),
    removed=st.sampled_from([[], [3], list(range(20))]),
    mutations=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_writer_who_knows_the_checksum_breaks_nothing(
    coding: Coding, removed: list[int], mutations: list[Mutation]
) -> None:
    data = bytearray(pack(index_of(coding, 32, removed).dump()[0]))
    for at, value in mutations:
        data[at % len(data)] = value
    try:
        segment = unpack(resealed(bytes(data)))
    except (CorruptRecordError, UnsupportedFormatError):
        return
    index = SegmentedIndex(2, 10, coding, 32)
    try:
        index.load([segment], segment.end)
    except ShapeError:
        return
    assert index.search(torch.ones(2, 1, 10), 40)[0].isnan().sum() == 0


@pytest.mark.parametrize(("offset", "layout"), [(8, "<I"), (12, "<I"), (16, "<I"), (24, "<Q"), (32, "<Q")])
@pytest.mark.parametrize("size", [0, 1 << 31, (1 << 32) - 1])
def test_hostile_sizes_are_refused_before_memory_is_taken(offset: int, layout: str, size: int) -> None:
    data = bytearray(pack(index_of(ByteCoding(), 32, []).dump()[0]))
    struct.pack_into(layout, data, offset, size if offset != 24 else size + 5)
    with pytest.raises(CorruptRecordError):
        unpack(resealed(bytes(data)))


def test_later_versions_and_unknown_kinds_are_named_as_such() -> None:
    data = bytearray(pack(index_of(ByteCoding(), 32, []).dump()[0]))
    for offset, value in ((4, 2), (6, 6), (7, 4)):
        changed = bytearray(data)
        changed[offset] = value
        with pytest.raises(UnsupportedFormatError):
            unpack(resealed(bytes(changed)))


def test_segments_that_do_not_fit_the_index_are_refused() -> None:
    first, second = index_of(ByteCoding(), 64, []).dump()
    index = SegmentedIndex(2, 10, segment_rows=32)
    with pytest.raises(ShapeError):
        index.load([second, first], 64)
    with pytest.raises(ShapeError):
        index.load([first, second], 63)
    for other in (SegmentedIndex(2, 10, FloatCoding(), 32), SegmentedIndex(2, 9, segment_rows=32)):
        with pytest.raises(ShapeError):
            other.load([first], 32)
    whole, tail = index_of(ByteCoding(), 40, []).dump()
    with pytest.raises(ShapeError, match="missing"):
        SegmentedIndex(2, 10, segment_rows=32).load([whole, tail], 41)
    with pytest.raises(ShapeError, match="missing"):
        SegmentedIndex(2, 10, segment_rows=64).load([index_of(ByteCoding(), 32, list(range(20))).dump()[0]], 32)
