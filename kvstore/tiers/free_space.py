# SPDX-License-Identifier: Apache-2.0
"""Free ranges of one extent file: first fit by address, neighbours coalesce. Arithmetic only, no I/O."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from kvstore.errors import CorruptRecordError


class FreeSpace:
    """Which bytes of `[0, nbytes)` are free. Ranges are disjoint, sorted, and never touch each other.

    First fit by address keeps a stream's blocks side by side, so that reads of neighbours merge into one.
    Not thread-safe.

    Args:
        nbytes: length of the address range; all of it is free.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._offsets: list[int] = [0] if nbytes else []
        self._sizes: list[int] = [nbytes] if nbytes else []
        self._nbytes = nbytes
        self._free_nbytes = nbytes

    @staticmethod
    def around(used: Iterable[tuple[int, int]], nbytes: int) -> FreeSpace:
        """Build the complement of `used` in `[0, max(nbytes, end of used))`.

        Args:
            used: (offset, nbytes) sorted by offset; overlaps are tolerated, a damaged catalogue must still open.
            nbytes: length of the file.
        """
        space = FreeSpace()
        for offset, used_nbytes in used:
            if offset > space._nbytes:
                space.extend(offset)
            if offset + used_nbytes > space._nbytes:
                space._nbytes = offset + used_nbytes
        if nbytes > space._nbytes:
            space.extend(nbytes)
        return space

    @property
    def nbytes(self) -> int:
        """Length of the address range."""
        return self._nbytes

    @property
    def free_nbytes(self) -> int:
        """Sum of all free ranges."""
        return self._free_nbytes

    @property
    def used_nbytes(self) -> int:
        """Sum of what is allocated."""
        return self._nbytes - self._free_nbytes

    @property
    def tail_nbytes(self) -> int:
        """Bytes of the free range that reaches the end; 0 when the last byte is used."""
        if self._offsets and self._offsets[-1] + self._sizes[-1] == self._nbytes:
            return self._sizes[-1]
        return 0

    def ranges(self) -> list[tuple[int, int]]:
        """Return the free ranges as (offset, nbytes), sorted."""
        return list(zip(self._offsets, self._sizes, strict=True))

    def allocate(self, nbytes: int) -> int | None:
        """Take `nbytes` from the first range that has them; None when no range does. One pass over the ranges."""
        assert nbytes > 0, f"allocate {nbytes} bytes"
        if nbytes > self._free_nbytes:
            return None
        for position, size in enumerate(self._sizes):
            if size < nbytes:
                continue
            offset = self._offsets[position]
            if size == nbytes:
                del self._offsets[position], self._sizes[position]
            else:
                self._offsets[position] += nbytes
                self._sizes[position] -= nbytes
            self._free_nbytes -= nbytes
            return offset
        return None

    def release(self, offset: int, nbytes: int) -> None:
        """Give a range back and join it with free neighbours.

        Raises:
            CorruptRecordError: a byte of it is free already, or lies outside: two owners of one byte would be next.
        """
        if not 0 <= offset < offset + nbytes <= self._nbytes:
            raise CorruptRecordError(f"{nbytes} bytes at {offset} lie outside of {self._nbytes}")
        position = bisect_left(self._offsets, offset)
        end = offset + nbytes
        before_end = self._offsets[position - 1] + self._sizes[position - 1] if position > 0 else -1
        after = self._offsets[position] if position < len(self._offsets) else self._nbytes + 1
        if offset < before_end or after < end:
            raise CorruptRecordError(f"of {nbytes} bytes at {offset}, some are free already")
        self._free_nbytes += nbytes
        joins_before, joins_after = before_end == offset, end == after
        if joins_before and joins_after:
            self._sizes[position - 1] += nbytes + self._sizes[position]
            del self._offsets[position], self._sizes[position]
        elif joins_before:
            self._sizes[position - 1] += nbytes
        elif joins_after:
            self._offsets[position] = offset
            self._sizes[position] += nbytes
        else:
            self._offsets.insert(position, offset)
            self._sizes.insert(position, nbytes)

    def extend(self, nbytes: int) -> None:
        """Lengthen the address range to `nbytes`; the new bytes are free."""
        added = nbytes - self._nbytes
        assert added > 0, f"extend from {self._nbytes} to {nbytes}"
        old = self._nbytes
        self._nbytes = nbytes
        self.release(old, added)

    def cut_tail(self) -> int:
        """Shorten the address range by its free tail; returns the new length."""
        tail = self.tail_nbytes
        if tail:
            del self._offsets[-1], self._sizes[-1]
            self._nbytes -= tail
            self._free_nbytes -= tail
        return self._nbytes
