# SPDX-License-Identifier: Apache-2.0
"""Read planning: which bytes of which file a batch needs, neighbours merged into one transfer. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

from kvstore.errors import CorruptRecordError
from kvstore.layout import ALIGNMENT, round_up
from kvstore.tiers.base import Extent
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES

MERGE_GAP_NBYTES = 64 << 10
"""Reading this much for nothing costs less than one more transfer (LLM in a flash, arXiv:2312.11514)."""


class Piece(NamedTuple):
    """What one item of a batch needs: whole pages `[start, end)` of a file."""

    item: int
    file_id: int
    start: int
    end: int


class Run(NamedTuple):
    """One transfer, and the pieces that lie in it."""

    file_id: int
    start: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.end - self.start


def whole_piece(item: int, extent: Extent) -> Piece:
    """Need a whole extent, header included."""
    return Piece(item, extent.file_id, extent.offset, extent.offset + extent.nbytes)


def part_piece(item: int, extent: Extent, offset: int, nbytes: int) -> Piece:
    """Need `nbytes` at `offset` of the record in `extent`.

    Raises:
        CorruptRecordError: the range leaves the extent: record and catalogue contradict each other.
    """
    start = EXTENT_HEADER_NBYTES + offset
    if offset < 0 or nbytes < 0 or nbytes > extent.nbytes - start:
        raise CorruptRecordError(f"planes at {offset}, {nbytes} bytes, leave an extent of {extent.nbytes} bytes")
    first_page = start // ALIGNMENT * ALIGNMENT
    return Piece(item, extent.file_id, extent.offset + first_page, extent.offset + round_up(start + nbytes))


def merge(pieces: Iterable[Piece], *, gap_nbytes: int, max_nbytes: int) -> list[Run]:
    """Join pieces that lie close together in one file, so that the device sees few large transfers.

    Args:
        pieces: in any order; they may overlap and repeat.
        gap_nbytes: bytes that may be read in vain between two pieces.
        max_nbytes: longest run; a single longer piece is a run of its own.

    Returns:
        Runs in disk order that cover every piece exactly once.
    """
    runs: list[Run] = []
    group: list[Piece] = []
    file_id = start = end = -1
    for piece in sorted(pieces, key=itemgetter(1, 2, 3)):
        if (
            group
            and piece.file_id == file_id
            and piece.start - end <= gap_nbytes
            and max(end, piece.end) - start <= max_nbytes
        ):
            group.append(piece)
            end = max(end, piece.end)
            continue
        if group:
            runs.append(Run(file_id, start, end, tuple(group)))
        group = [piece]
        _, file_id, start, end = piece
    if group:
        runs.append(Run(file_id, start, end, tuple(group)))
    return runs
