# SPDX-License-Identifier: Apache-2.0
"""Free ranges of one extent file: first fit by address, neighbours coalesce. Arithmetic only, no I/O."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from kvstore.errors import CorruptRecordError

_MAX_BUCKET_RANGES = 1024


class _Bucket:
    """A run of neighbouring free ranges, never empty inside a `FreeSpace`."""

    __slots__ = ("offsets", "sizes")

    def __init__(self, offsets: list[int], sizes: list[int]) -> None:
        self.offsets = offsets
        self.sizes = sizes


class FreeSpace:
    """Which bytes of `[0, nbytes)` are free. Ranges are disjoint, sorted, and never touch each other.

    First fit by address keeps a stream's blocks side by side, so that reads of neighbours merge into one, and has the
    best bound of all policies that move nothing: blocks of 1 to n pages that take M bytes at most need less than
    M * (1 + log2 n) bytes of file, and no policy does better than half of that (Robson, JACM 1974 and Computer
    Journal 1977). What it really takes is far less, and compaction takes it back.

    Ranges lie in buckets that know their largest one, so a call looks at one entry per bucket and at one bucket:
    O(sqrt n) for up to a million ranges. Not thread-safe.

    Args:
        nbytes: length of the address range; all of it is free.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._buckets: list[_Bucket] = []
        self._firsts: list[int] = []
        self._largest: list[int] = []
        self._nbytes = nbytes
        self._free_nbytes = nbytes
        if nbytes:
            self._insert(0, 0, 0, nbytes)

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
        if self._buckets:
            last = self._buckets[-1]
            if last.offsets[-1] + last.sizes[-1] == self._nbytes:
                return last.sizes[-1]
        return 0

    @property
    def first_free(self) -> int | None:
        """Lowest free offset; None when all is used."""
        return self._firsts[0] if self._firsts else None

    def ranges(self) -> list[tuple[int, int]]:
        """Return the free ranges as (offset, nbytes), sorted."""
        return [pair for bucket in self._buckets for pair in zip(bucket.offsets, bucket.sizes, strict=True)]

    def allocate(self, nbytes: int, below: int | None = None) -> int | None:
        """Take `nbytes` from the first range that has them; None when no range does.

        Args:
            nbytes: how many.
            below: the bytes must end at or before this offset.
        """
        place = self._first_fit(nbytes)
        if place is None:
            return None
        offset = self._buckets[place[0]].offsets[place[1]]
        if below is not None and offset + nbytes > below:
            return None
        self._take(*place, nbytes)
        return offset

    def allocate_run(self, sizes: Sequence[int]) -> tuple[int, int] | None:
        """Take ranges one behind the other; as first fit places them one by one.

        Args:
            sizes: bytes of each, at least one.

        Returns:
            Where the first one begins, and how many were taken: the free range ends there, or the next one is smaller
            than the first, and may have a place before it. None when no range has the first.
        """
        place = self._first_fit(sizes[0])
        if place is None:
            return None
        number, position = place
        offset, room = self._buckets[number].offsets[position], self._buckets[number].sizes[position]
        nbytes = count = 0
        for size in sizes:
            if size < sizes[0] or nbytes + size > room:
                break
            nbytes += size
            count += 1
        self._take(number, position, nbytes)
        return offset, count

    def release(self, offset: int, nbytes: int) -> None:
        """Give a range back and join it with free neighbours.

        Raises:
            CorruptRecordError: a byte of it is free already, or lies outside: two owners of one byte would be next.
        """
        if not 0 <= offset < offset + nbytes <= self._nbytes:
            raise CorruptRecordError(f"{nbytes} bytes at {offset} lie outside of {self._nbytes}")
        number = max(0, bisect_right(self._firsts, offset) - 1)
        bucket = self._buckets[number] if self._buckets else _Bucket([], [])
        position = bisect_left(bucket.offsets, offset)
        end = offset + nbytes
        before_end = bucket.offsets[position - 1] + bucket.sizes[position - 1] if position > 0 else -1
        next_number, next_position = (number, position) if position < len(bucket.offsets) else (number + 1, 0)
        has_next = next_number < len(self._buckets)
        after = self._buckets[next_number].offsets[next_position] if has_next else self._nbytes + 1
        if offset < before_end or after < end:
            raise CorruptRecordError(f"of {nbytes} bytes at {offset}, some are free already")
        self._free_nbytes += nbytes
        if end == after:
            nbytes += self._buckets[next_number].sizes[next_position]
            if before_end != offset:
                self._change(next_number, next_position, offset, nbytes)
                return
            self._remove(next_number, next_position)
        if before_end == offset:
            start = bucket.offsets[position - 1]
            self._change(number, position - 1, start, offset + nbytes - start)
        else:
            self._insert(number, position, offset, nbytes)

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
            self._remove(len(self._buckets) - 1, len(self._buckets[-1].offsets) - 1)
            self._nbytes -= tail
            self._free_nbytes -= tail
        return self._nbytes

    def _first_fit(self, nbytes: int) -> tuple[int, int] | None:
        """Bucket, and place in it, of the first range that has `nbytes`."""
        assert nbytes > 0, f"allocate {nbytes} bytes"
        number = next((number for number, largest in enumerate(self._largest) if largest >= nbytes), None)
        if number is None:
            return None
        return number, next(at for at, size in enumerate(self._buckets[number].sizes) if size >= nbytes)

    def _take(self, number: int, position: int, nbytes: int) -> None:
        """Take the first bytes of a range."""
        bucket = self._buckets[number]
        offset, size = bucket.offsets[position], bucket.sizes[position]
        if size == nbytes:
            self._remove(number, position)
        else:
            self._change(number, position, offset + nbytes, size - nbytes)
        self._free_nbytes -= nbytes

    def _insert(self, number: int, position: int, offset: int, size: int) -> None:
        if not self._buckets:
            self._buckets.append(_Bucket([offset], [size]))
            self._firsts.append(offset)
            self._largest.append(size)
            return
        bucket = self._buckets[number]
        bucket.offsets.insert(position, offset)
        bucket.sizes.insert(position, size)
        self._firsts[number] = bucket.offsets[0]
        self._largest[number] = max(self._largest[number], size)
        if len(bucket.offsets) > _MAX_BUCKET_RANGES:
            self._split(number)

    def _split(self, number: int) -> None:
        bucket = self._buckets[number]
        half = len(bucket.offsets) // 2
        upper = _Bucket(bucket.offsets[half:], bucket.sizes[half:])
        del bucket.offsets[half:], bucket.sizes[half:]
        self._largest[number] = max(bucket.sizes)
        self._buckets.insert(number + 1, upper)
        self._firsts.insert(number + 1, upper.offsets[0])
        self._largest.insert(number + 1, max(upper.sizes))

    def _remove(self, number: int, position: int) -> None:
        bucket = self._buckets[number]
        size = bucket.sizes[position]
        del bucket.offsets[position], bucket.sizes[position]
        if not bucket.offsets:
            del self._buckets[number], self._firsts[number], self._largest[number]
            return
        self._firsts[number] = bucket.offsets[0]
        if size == self._largest[number]:
            self._largest[number] = max(bucket.sizes)

    def _change(self, number: int, position: int, offset: int, size: int) -> None:
        bucket = self._buckets[number]
        old = bucket.sizes[position]
        bucket.offsets[position], bucket.sizes[position] = offset, size
        self._firsts[number] = bucket.offsets[0]
        if size > self._largest[number]:
            self._largest[number] = size
        elif old == self._largest[number]:
            self._largest[number] = max(bucket.sizes)
