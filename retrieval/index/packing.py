# SPDX-License-Identifier: Apache-2.0
"""Segments as bytes: a header, numbers and marks where there are some, the coded rows; all under one checksum.

```
0  4  magic "KVIX"        8  4  partitions    24  8  first
4  2  version, 1         12  4  width         32  8  end
6  1  kind of the rows   16  4  rows          40  4  CRC32C of all bytes but these four
7  1  1: numbers,        20  4  zeros         44     numbers [rows] int64 | removed [rows] of 0 or 1 | parts of the rows
      2: removed rows
```

Little-endian. Kinds: 1 float32, 2 float16, 3 bfloat16, 4 float8 e4m3, each `[partitions, rows, width]`; 5 bytes: codes
as `byte_rows.codes_shape` says, low, step.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError, ShapeError, UnsupportedFormatError
from kvstore.native import crc32c
from kvstore.retrieval.index.byte_rows import ByteRows, codes_shape
from kvstore.retrieval.index.coding import SealedRows
from kvstore.retrieval.index.float_rows import FLOAT_DTYPES, FloatRows
from kvstore.retrieval.index.lasting import lasting_copy
from kvstore.retrieval.index.segment import Segment

_HEADER = struct.Struct("<4sHBBIIIIQQ")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"KVIX"
_VERSION = 1
_BYTES = 5
_HAS_NUMBERS, _HAS_DEAD = 1, 2
_MOST_PARTITIONS, _MOST_WIDTH, _MOST_ROWS, _LAST_NUMBER = 1 << 12, 1 << 14, 1 << 20, 1 << 62

_Shapes = list[tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of rows.

    Args:
        shapes: of the parts of rows, from partitions, rows and width.
        made: makes rows of parts and their number.
    """

    shapes: Callable[[int, int, int], _Shapes]
    made: Callable[[tuple[Tensor, ...], int], SealedRows]


def _float_kind(dtype: torch.dtype) -> _Kind:
    return _Kind(
        lambda partitions, rows, width: [((partitions, rows, width), dtype)], lambda parts, _: FloatRows(*parts)
    )


def _byte_shapes(partitions: int, rows: int, width: int) -> _Shapes:
    per_channel = ((partitions, width), torch.float32)
    return [(codes_shape(partitions, rows, width), torch.uint8), per_channel, per_channel]


_KINDS = {number: _float_kind(dtype) for number, dtype in enumerate(FLOAT_DTYPES, start=1)}
_KINDS[_BYTES] = _Kind(_byte_shapes, lambda parts, rows: ByteRows(parts[0], parts[1], parts[2], rows))


def pack(segment: Segment) -> bytes:
    """A segment as bytes; the same segment always gives the same ones.

    Raises:
        ShapeError: more rows, partitions or elements than the format holds.
    """
    match segment.rows:
        case FloatRows(rows=rows):
            kind, (partitions, _, width) = 1 + FLOAT_DTYPES.index(rows.dtype), rows.shape
        case ByteRows(parts=(_, low, _)):
            kind, (partitions, width) = _BYTES, low.shape
        case other:
            raise ShapeError(f"rows of {type(other).__name__} have no form as bytes")
    count = segment.rows.num_rows
    if not _is_plausible(partitions, width, count, segment.first, segment.end):
        raise ShapeError(f"a segment of {partitions} x {count} x {width} elements is empty or too large to be packed")
    flags = (segment.numbers is not None) * _HAS_NUMBERS | (segment.dead is not None) * _HAS_DEAD
    header = _HEADER.pack(_MAGIC, _VERSION, kind, flags, partitions, width, count, 0, segment.first, segment.end)
    tensors = [part for part in (segment.numbers, segment.dead, *segment.rows.parts) if part is not None]
    payload = b"".join(part.cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in tensors)
    return header + _CHECKSUM.pack(crc32c(payload, crc32c(header))) + payload


def unpack(data: bytes | bytearray | memoryview) -> Segment:
    """The segment that `pack` made these bytes of.

    Sizes are compared with the length of `data` before anything is allocated.

    Raises:
        CorruptRecordError: these are other bytes.
        UnsupportedFormatError: whole, but of a later version or an unknown kind.
    """
    view = memoryview(data).cast("B")
    start = _HEADER.size + _CHECKSUM.size
    if len(view) < start or view[:4] != _MAGIC:
        raise CorruptRecordError(f"no segment of an index: {len(view)} bytes that do not start with its header")
    (wanted,) = _CHECKSUM.unpack_from(view, _HEADER.size)
    if crc32c(view[start:], crc32c(view[: _HEADER.size])) != wanted:
        raise CorruptRecordError("a segment of an index fails its checksum: drop it, and build its rows anew")
    _, version, number, flags, partitions, width, count, zeros, first, end = _HEADER.unpack_from(view)
    if version != _VERSION or number not in _KINDS or flags > _HAS_NUMBERS | _HAS_DEAD or zeros:
        raise UnsupportedFormatError(f"a segment of version {version}, kind {number}, flags {flags}: update kvstore")
    if not _is_plausible(partitions, width, count, first, end):
        raise CorruptRecordError(f"a segment of {partitions} x {count} x {width} elements, rows {first} to {end}")
    kind = _KINDS[number]
    shapes = kind.shapes(partitions, count, width)
    if flags & _HAS_DEAD:
        shapes.insert(0, ((count,), torch.uint8))
    if flags & _HAS_NUMBERS:
        shapes.insert(0, ((count,), torch.int64))
    if len(view) - start != sum(prod(shape) * dtype.itemsize for shape, dtype in shapes):
        raise CorruptRecordError(f"a segment of an index has {len(view) - start} bytes of rows, not what it says")
    parts = []
    for shape, dtype in shapes:
        nbytes = prod(shape) * dtype.itemsize
        # A copy, which is aligned to cache lines.
        parts.append(
            lasting_copy(torch.frombuffer(bytearray(view[start : start + nbytes]), dtype=dtype).reshape(shape))
        )
        start += nbytes
    numbers = parts.pop(0) if flags & _HAS_NUMBERS else None
    dead = parts.pop(0) if flags & _HAS_DEAD else None
    _check(numbers, dead, parts, count, first, end)
    return Segment(first, end, kind.made(tuple(parts), count), numbers, None if dead is None else dead.bool())


def _is_plausible(partitions: int, width: int, count: int, first: int, end: int) -> bool:
    sizes = 1 <= partitions <= _MOST_PARTITIONS and 1 <= width <= _MOST_WIDTH and 1 <= count <= _MOST_ROWS
    return sizes and 0 <= first < end <= _LAST_NUMBER and count <= end - first <= _MOST_ROWS


def _check(numbers: Tensor | None, dead: Tensor | None, parts: list[Tensor], count: int, first: int, end: int) -> None:
    """Refuse contents that would make wrong rows of a segment that was not written by `pack`."""
    if numbers is None:
        fits = count == end - first
    else:
        fits = bool((numbers.diff() > 0).all()) and first <= int(numbers[0]) and int(numbers[-1]) < end
    marks = dead is None or int(dead.max()) <= 1
    finite = all(bool(part.float().isfinite().all()) for part in parts if part.dtype is not torch.uint8)
    if not (fits and marks and finite):
        raise CorruptRecordError(f"rows {first} to {end} of an index: numbers, marks or elements are out of range")
