# SPDX-License-Identifier: Apache-2.0
"""Units of a layer's memory as bytes, to be kept with a stream: their summaries, which tokens they hold, estimates.

```
0  4  magic "KVXU"       8  8  first unit      24  4  units         36  4  width of an estimate, 0 for none
4  2  version, 1        16  8  first token     28  4  tokens        40  4  1: tokens of a unit follow each other
6  2  views                                    32  4  tables        44  4  chunks
48  bytes of each chunk, u64 | segments of each view, u32 | sizes [tables, units] u32 | tokens [tables, tokens] u32,
    counted from the first, unless they follow each other | estimates [kv_heads, units, width] float32 | segments
```

Little-endian. Whoever keeps it checks its checksum; sizes and numbers are checked here.
"""

from __future__ import annotations

import struct
from math import prod

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.retrieval.index.float_rows import FloatRows
from kvstore.retrieval.index.packing import pack, unpack
from kvstore.retrieval.index.segment import Segment
from kvstore.retrieval.index.segmented import SegmentedIndex
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.units import Units

_HEADER = struct.Struct("<4sHHQQIIIIII")
_MAGIC = b"KVXU"
_VERSION = 1
_NUM_TABLES = 4  # chunks before the segments


def pack_units(memory: LayerMemory, first: int, end: int) -> bytes:
    """Some units of a layer as bytes.

    Args:
        memory: of the layer; its indices are `SegmentedIndex`, and no block of its tokens was lost.
        first: number of the first unit, where `is_boundary` holds and a segment of each index begins.
        end: number behind the last one, likewise, or the end of all that are cut.
    """
    tokens, sizes = memory.table.between(first, end)
    first_token = int(tokens.min()) if tokens.numel() else 0
    follow = tokens.shape[0] == 1 and bool((tokens[0].diff() == 1).all())
    estimates = memory.estimates.between(first, end) if memory.estimates is not None else torch.empty(0, 0, 0)
    of_views = [_segments(index, first, end) for index in memory.indices]
    chunks = [
        struct.pack(f"<{len(of_views)}I", *map(len, of_views)),
        _bytes(sizes.to(torch.int32)),
        b"" if follow else _bytes((tokens - first_token).to(torch.int32)),
        _bytes(estimates),
        *(pack(segment) for segments in of_views for segment in segments),
    ]
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        len(of_views),
        first,
        first_token,
        end - first,
        tokens.shape[1],
        tokens.shape[0],
        estimates.shape[2],
        follow,
        len(chunks),
    )
    return b"".join([header, struct.pack(f"<{len(chunks)}Q", *map(len, chunks)), *chunks])


def load_units(memory: LayerMemory, data: bytes, end_token: int) -> None:
    """Append what `pack_units` made of a memory with the same policy; scores and choices are the same as before.

    A failure may leave some of it behind: make the memory anew then.

    Args:
        memory: of the layer; its indices are `SegmentedIndex`.
        data: the bytes.
        end_token: number behind the last token that they may be of.

    Raises:
        CorruptRecordError: these are other bytes, or not the units that follow.
        UnsupportedFormatError: of a later version.
        ShapeError: of another policy or model.
    """
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise CorruptRecordError(f"no units of a layer: {len(data)} bytes that do not start with their header")
    _, version, views, first, first_token, units, tokens, tables, width, follow, count = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise UnsupportedFormatError(f"units of a layer of version {version}: update kvstore")
    chunks = _chunks(data, count)
    is_next = first == memory.num_units and first_token + tokens <= end_token
    is_next &= memory.next_token in (None, first_token) or units == 0
    if views != len(memory.indices) or count < _NUM_TABLES or not is_next or len(chunks[0]) != 4 * views:
        raise CorruptRecordError(f"units {first} of a layer from token {first_token} on do not follow those before")
    if (width > 0) != (memory.estimates is not None) or tables not in (1, memory.kv_heads):
        raise CorruptRecordError(f"units of a layer: {tables} tables, estimates of {width}: not of this policy")
    counts = struct.unpack(f"<{views}I", chunks[0])
    if sum(counts) != count - _NUM_TABLES:
        raise CorruptRecordError(f"units of a layer: {counts} segments in {count} chunks")
    places = torch.arange(tokens).expand(tables, -1) if follow else _tensor(chunks[2], torch.int32, (tables, tokens))
    cut = _units(places.long(), _tensor(chunks[1], torch.int32, (tables, units)).long(), first_token)
    segments = [unpack(chunk) for chunk in chunks[_NUM_TABLES:]]
    for index in memory.indices:
        assert isinstance(index, SegmentedIndex), "asked by the caller"
        taken, segments, counts = segments[: counts[0]], segments[counts[0] :], counts[1:]
        index.load(taken, first + units)
        if index.num_rows != first + units:
            raise CorruptRecordError(f"units of a layer: {index.num_rows} summaries of {first + units}")
    if memory.has_own_table:
        memory.table.add(cut)
    elif not torch.equal(memory.table.between(first, first + units)[0], torch.stack([each.tokens for each in cut])):
        raise CorruptRecordError(f"units {first} of a layer are not those of the others")
    if memory.estimates is not None:
        estimates = _tensor(chunks[3], torch.float32, (memory.kv_heads, units, width))
        if not bool(estimates.isfinite().all()):
            raise CorruptRecordError("units of a layer: estimates that are not finite")
        memory.estimates.append(estimates)
    if units:
        memory.go_on_at(first_token + tokens)


def _segments(index: object, first: int, end: int) -> list[Segment]:
    assert isinstance(index, SegmentedIndex), "asked by the caller"
    found = [segment for segment in index.dump() if first <= segment.first and segment.end <= end]
    return [_halved(segment) for segment in found]


def _halved(segment: Segment) -> Segment:
    """A tail in 16 bits, which its rows were rounded to; sealed rows as they are."""
    if isinstance(segment.rows, FloatRows) and segment.rows.rows.dtype is torch.float32:
        rows = FloatRows(segment.rows.rows.to(torch.bfloat16))
        return Segment(segment.first, segment.end, rows, segment.numbers, segment.dead)
    return segment


def _units(places: Tensor, sizes: Tensor, first_token: int) -> list[Units]:
    num_tokens = places.shape[1]
    made = []
    for row, of_units in zip(places, sizes, strict=True):
        if bool((of_units < 1).any()) or int(of_units.sum()) != num_tokens:
            raise CorruptRecordError(f"units of a layer do not hold the {num_tokens} tokens that they are said to")
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), of_units.cumsum(0)])
        rises = row.diff() > 0
        rises[starts[1:-1] - 1] = True
        if not torch.equal(row.sort().values, torch.arange(num_tokens)) or not bool(rises.all()):
            raise CorruptRecordError("units of a layer hold other tokens than they are said to")
        made.append(Units(row + first_token, starts))
    return made


def _chunks(data: bytes, count: int) -> list[memoryview]:
    start = _HEADER.size + 8 * count
    if start > len(data):
        raise CorruptRecordError(f"units of a layer: {count} chunks in {len(data)} bytes")
    sizes = struct.unpack_from(f"<{count}Q", data, _HEADER.size)
    if sum(sizes) != len(data) - start:
        raise CorruptRecordError(f"units of a layer: chunks of {sum(sizes)} bytes in {len(data) - start}")
    chunks, view = [], memoryview(data)
    for nbytes in sizes:
        chunks.append(view[start : start + nbytes])
        start += nbytes
    return chunks


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _tensor(chunk: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if len(chunk) != prod(shape) * dtype.itemsize:
        raise CorruptRecordError(f"units of a layer: a table of {shape} in {len(chunk)} bytes")
    return torch.frombuffer(bytearray(chunk), dtype=dtype).view(shape) if chunk else torch.empty(shape, dtype=dtype)
