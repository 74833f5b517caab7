# SPDX-License-Identifier: Apache-2.0
"""Staging memory: a few equal regions that extents are read into before they are decoded."""

from __future__ import annotations

import threading

from kvstore.native import Arena


class Staging:
    """`num_regions` regions of `region_nbytes` in one page-aligned arena. Thread-safe.

    A region is named by the offset of its first byte. Users of one never wait for another while they hold it, so
    waiting in `acquire` always ends.
    """

    def __init__(self, num_regions: int, region_nbytes: int) -> None:
        self.region_nbytes = region_nbytes
        self.arena = Arena(num_regions * region_nbytes, False)
        self._changed = threading.Condition()
        self._free = [number * region_nbytes for number in range(num_regions)]

    def acquire(self) -> int:
        """Take a region; waits until one is free."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            return self._free.pop()

    def try_acquire(self) -> int | None:
        """Take a region if one is free."""
        with self._changed:
            return self._free.pop() if self._free else None

    def release(self, region: int) -> None:
        """Give a region back."""
        with self._changed:
            assert region not in self._free, "region released twice"
            self._free.append(region)
            self._changed.notify()

    def close(self) -> None:
        """Let go of the memory, which lives as long as anybody reads it."""
        del self.arena
