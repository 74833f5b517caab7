# SPDX-License-Identifier: Apache-2.0
"""Staging memory: a few equal regions that extents are read into before they are decoded."""

from __future__ import annotations

import threading

from kvstore.native import Arena


class Region:
    """The right to use one region, once `Staging.take` has granted it; `start` is the offset of its first byte."""

    __slots__ = ("start",)

    def __init__(self) -> None:
        self.start = -1


class Staging:
    """`num_regions` regions of `region_nbytes` in one page-aligned arena. Thread-safe.

    Users of one never wait for another while they hold it, so waiting in `take` always ends. A region that was taken
    and not released is gone for ever: who makes a `Region` sees to its release first, and takes it then, so that no
    interrupt comes between.
    """

    def __init__(self, num_regions: int, region_nbytes: int) -> None:
        self.region_nbytes = region_nbytes
        self.arena = Arena(num_regions * region_nbytes, False)
        self._lock = threading.Lock()  # in `with`, as in `BatchTicket`
        self._changed = threading.Condition(self._lock)
        self._starts = range(0, num_regions * region_nbytes, region_nbytes)
        self._taken: dict[int, Region] = {}

    @property
    def num_free(self) -> int:
        """Regions that nobody uses."""
        return len(self._starts) - len(self._taken)

    def take(self, region: Region, *, may_wait: bool = True) -> bool:
        """Take a region; waits until one is free, or returns False."""
        with self._lock:
            while len(self._taken) == len(self._starts):
                if not may_wait:
                    return False
                self._changed.wait()
            region.start = next(start for start in self._starts if start not in self._taken)
            self._taken[region.start] = region
            return True

    def release(self, region: Region) -> None:
        """Give a region back; does nothing for one that was given back, or never taken."""
        with self._lock:
            if self._taken.get(region.start) is region:
                del self._taken[region.start]
            self._changed.notify()

    def close(self) -> None:
        """Let go of the memory, which lives as long as anybody reads it."""
        del self.arena
