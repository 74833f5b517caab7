# SPDX-License-Identifier: Apache-2.0
"""A piece of a late-interaction index: what a run of blocks adds to it, and that as bytes.

The head of a piece, little-endian, without gaps:

```
0  4  magic "KVLP"      12  4  part_dim        28  4  blocks         44  4  counted words
4  2  version, 1        16  8  first block     32  4  postings       48  4  CRC32C of all bytes but these four
6  2  zeros             24  4  words before    36  4  new words
8  4  compared layers                          40  4  zeros
52 mean [layers, part_dim] f32 | scales of new words f32 | rows of each block u32 | postings of each block u32 |
   rows of each counted word u32 | counted words u16 | postings u16 | codes of new words [new words, part_dim] i8
```

Each block's rows are a part of their own: `rows.pack_rows`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.native import crc32c
from kvstore.retrieval.late.rows import TokenRows, are_scales
from kvstore.retrieval.late.words import MAX_WORDS, Vocabulary

_HEAD = struct.Struct("<4sHHIIQIIIIII")
_CHECKSUM = struct.Struct("<I")
_MAGIC, _VERSION = b"KVLP", 1
_MAX_BLOCKS = 1 << 62


@dataclass(frozen=True, slots=True)
class PieceHead:
    """What is kept in memory of a piece.

    Args:
        mean: [num_parts, part_dim] float32: removed from keys before their directions are taken.
        first_block: its first block of the stream.
        rows_of_block: [num_blocks] int64: rows of each block; 0 for one whose keys could not be read.
        words_before: words that the pieces before have made.
        new_words: those that this one makes.
        counted: [num_counted] int64 ascending: words of its rows.
        counts: [num_counted] int64: rows of each of them.
        postings_of_block: [num_blocks] int64.
        postings: [num_postings] uint16: the words of each block, ascending, block by block.
    """

    mean: Tensor
    first_block: int
    rows_of_block: Tensor
    words_before: int
    new_words: TokenRows
    counted: Tensor
    counts: Tensor
    postings_of_block: Tensor
    postings: np.ndarray[tuple[int], np.dtype[np.uint16]]

    @property
    def end_block(self) -> int:
        """The block behind it."""
        return self.first_block + self.rows_of_block.shape[0]


def seal(
    vocabulary: Vocabulary, mean: Tensor, first_block: int, blocks: Sequence[TokenRows]
) -> tuple[PieceHead, list[Tensor]]:
    """Make a piece of blocks; their new words are in the vocabulary then.

    Args:
        vocabulary: of all rows before.
        mean: see `PieceHead`.
        first_block: number of the first one.
        blocks: their rows; none for a block that was lost.

    Returns:
        The head, and of each block the words of its rows: `[num_rows]` int64.
    """
    words_before = vocabulary.num_words
    sizes = [rows.num_rows for rows in blocks]
    words = vocabulary.assign(TokenRows.joined(blocks, prod(mean.shape)))
    counted, counts = words.unique(return_counts=True)
    of_blocks = list(words.split(sizes))
    distinct = [of_block.unique() for of_block in of_blocks]
    head = PieceHead(
        mean,
        first_block,
        torch.tensor(sizes),
        words_before,
        vocabulary.words_from(words_before),
        counted,
        counts,
        torch.tensor([each.shape[0] for each in distinct]),
        torch.cat(distinct).numpy().astype(np.uint16),
    )
    return head, of_blocks


def pack_head(head: PieceHead) -> bytes:
    """The head as bytes; the same head always gives the same ones."""
    arrays = (
        head.mean.numpy().astype("<f4"),
        head.new_words.scales.numpy().astype("<f4"),
        head.rows_of_block.numpy().astype("<u4"),
        head.postings_of_block.numpy().astype("<u4"),
        head.counts.numpy().astype("<u4"),
        head.counted.numpy().astype("<u2"),
        head.postings.astype("<u2"),
        head.new_words.codes.numpy(),
    )
    payload = b"".join(array.tobytes() for array in arrays)
    num_parts, part_dim = head.mean.shape
    sizes = (head.rows_of_block.shape[0], head.postings.shape[0], head.new_words.num_rows, 0, head.counted.shape[0])
    packed = _HEAD.pack(_MAGIC, _VERSION, 0, num_parts, part_dim, head.first_block, head.words_before, *sizes)
    return packed + _CHECKSUM.pack(crc32c(payload, crc32c(packed))) + payload


def unpack_head(data: bytes, num_parts: int, part_dim: int) -> PieceHead:
    """The head that these are the bytes of; sizes are compared with their number before anything is allocated.

    Args:
        data: what `pack_head` returned.
        num_parts: compared layers of the stream.
        part_dim: elements of one layer's part of a row.

    Raises:
        CorruptRecordError: these are other bytes, or of another model.
        UnsupportedFormatError: whole, but of a later version.
    """
    start = _HEAD.size + _CHECKSUM.size
    if len(data) < start or data[:4] != _MAGIC:
        raise CorruptRecordError(f"no piece of an index: {len(data)} bytes that do not start with its head")
    if crc32c(data[start:], crc32c(data[: _HEAD.size])) != _CHECKSUM.unpack_from(data, _HEAD.size)[0]:
        raise CorruptRecordError("a piece of an index fails its checksum")
    _, version, zeros, parts, dim, first, before, blocks, postings, new, more, counted = _HEAD.unpack_from(data)
    if version != _VERSION or zeros or more:
        raise UnsupportedFormatError(f"a piece of an index of version {version}: update kvstore")
    sizes = (4 * parts * dim, 4 * new, 4 * blocks, 4 * blocks, 4 * counted, 2 * counted, 2 * postings, new * dim)
    if (parts, dim) != (num_parts, part_dim) or len(data) - start != sum(sizes) or first > _MAX_BLOCKS or not blocks:
        raise CorruptRecordError(f"a piece of an index of {parts} layers, {dim} elements, {len(data)} bytes")
    fields = []
    for nbytes in sizes:
        fields.append(data[start : start + nbytes])
        start += nbytes
    codes = torch.from_numpy(np.frombuffer(fields[7], np.int8).copy()).view(new, dim)
    head = PieceHead(
        torch.from_numpy(np.frombuffer(fields[0], "<f4").astype(np.float32)).view(parts, dim),
        first,
        _numbers(fields[2], "<u4"),
        before,
        TokenRows(codes, torch.from_numpy(np.frombuffer(fields[1], "<f4").astype(np.float32))),
        _numbers(fields[5], "<u2"),
        _numbers(fields[4], "<u4"),
        _numbers(fields[3], "<u4"),
        np.frombuffer(fields[6], "<u2").astype(np.uint16),
    )
    _check(head)
    return head


def _numbers(data: bytes, dtype: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype).astype(np.int64))


def _check(head: PieceHead) -> None:
    """Refuse contents that `seal` never makes, and that would be numbers of nothing."""
    num_words = head.words_before + head.new_words.num_rows
    numbers = (head.postings, head.counted.numpy())
    is_finite = bool(head.mean.isfinite().all()) and are_scales(head.new_words.scales)
    is_counted = int(head.postings_of_block.sum()) == head.postings.shape[0]
    is_whole = is_counted and int(head.counts.sum()) == int(head.rows_of_block.sum())
    is_known = num_words <= MAX_WORDS and all(bool((each < num_words).all()) for each in numbers)
    if not (is_finite and is_whole and is_known):
        raise CorruptRecordError(f"a piece of an index from block {head.first_block} on: its numbers are out of range")
