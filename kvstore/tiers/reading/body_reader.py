# SPDX-License-Identifier: Apache-2.0
"""Reads slices of the bodies of objects: only their pages, neighbours merged, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

from kvstore.errors import CorruptRecordError, KVStoreError
from kvstore.layout import ALIGNMENT
from kvstore.native import IoPool, crc32c
from kvstore.tiers.base import Extent
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.reading.extent_reader import ExtentReader
from kvstore.tiers.reading.plan import Piece, part_piece
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES

_CHUNK_NBYTES = 1 << 20


class Slice(NamedTuple):
    """Bytes of a body: where it lies, which of them, and their CRC32C, where that is known."""

    extent: Extent
    offset: int
    nbytes: int
    checksum: int | None


class _Chunk(NamedTuple):
    """A slice, or a part of a long one."""

    number: int
    offset: int
    nbytes: int


class BodyReader:
    """Reads slices. Thread-safe; what is in flight is bounded, whatever is asked for.

    Args:
        files: the extent files.
        pool: moves the bytes.
    """

    def __init__(self, files: ExtentFiles, pool: IoPool) -> None:
        with ExitStack() as building:
            helpers = ThreadPoolExecutor(1)  # none is asked for help: copying is faster than any device
            building.callback(helpers.shutdown)
            self._reader = ExtentReader(files, pool, helpers, 0, _CHUNK_NBYTES + 2 * ALIGNMENT)
            building.callback(self._reader.close)
            self._cleanup = building.pop_all()

    def read(self, slices: Sequence[Slice]) -> tuple[list[bytes | None], int]:
        """Read slices; one that cannot be read, or whose checksum is another, is None.

        Returns:
            Their bytes, and how many were read from the device.
        """
        found: list[bytes | None] = [None] * len(slices)
        long: dict[int, dict[int, bytes]] = {}
        chunks: list[_Chunk] = []
        pieces: list[Piece] = []
        for number, each in enumerate(slices):
            if each.nbytes == 0:
                found[number] = _checked(b"", each)
            for offset in range(each.offset, each.offset + each.nbytes, _CHUNK_NBYTES):
                nbytes = min(_CHUNK_NBYTES, each.offset + each.nbytes - offset)
                try:
                    pieces.append(part_piece(len(chunks), each.extent, offset, nbytes))
                except CorruptRecordError:
                    continue  # the slice leaves the extent
                chunks.append(_Chunk(number, offset, nbytes))
        if not pieces:
            return found, 0

        def take(job: Sequence[tuple[Piece, int]]) -> None:
            for piece, start in job:
                number, offset, nbytes = chunks[piece.item]
                begin = start + (EXTENT_HEADER_NBYTES + offset) % ALIGNMENT
                data = memory[begin : begin + nbytes]
                if nbytes == slices[number].nbytes:
                    found[number] = _checked(data, slices[number])
                else:
                    long.setdefault(number, {})[offset] = bytes(data)

        with memoryview(self._reader.memory) as memory:
            num_read = self._reader.read([pieces], take, _leave_out)
        for number, parts in long.items():
            data = b"".join(part for _, part in sorted(parts.items()))
            if len(data) == slices[number].nbytes:
                found[number] = _checked(data, slices[number])
        return found, num_read

    def close(self) -> None:
        """Give the memory back."""
        self._cleanup.close()


def _checked(data: bytes | memoryview, wanted: Slice) -> bytes | None:
    return None if wanted.checksum is not None and crc32c(data) != wanted.checksum else bytes(data)


def _leave_out(piece: Piece, error: KVStoreError) -> None:
    """What cannot be read is not among what was found."""
