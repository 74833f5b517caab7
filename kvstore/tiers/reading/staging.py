# SPDX-License-Identifier: Apache-2.0
"""Staging memory: a few equal regions that extents are read into before they are decoded."""

from __future__ import annotations

import threading

from kvstore.native import Arena


class Region:
    """One piece of staging memory, given back when its last user is done.

    Args:
        staging: where it goes back to.
        offset: its first byte in the arena.
    """

    __slots__ = ("_staging", "_users", "offset")

    def __init__(self, staging: Staging, offset: int) -> None:
        self._staging = staging
        self._users = 1
        self.offset = offset

    def retain(self) -> None:
        """Add a user; only a user may do so."""
        with self._staging.changed:
            self._users += 1

    def release(self) -> None:
        """Be done with it."""
        with self._staging.changed:
            self._users -= 1
            assert self._users >= 0, "region released twice"
            if self._users == 0:
                self._staging.free.append(self.offset)
                self._staging.changed.notify()


class Staging:
    """`num_regions` regions of `region_nbytes` in one page-aligned arena. Thread-safe.

    Users of a region never wait for another one while they hold it, so waiting in `acquire` always ends.
    """

    def __init__(self, num_regions: int, region_nbytes: int) -> None:
        self.region_nbytes = region_nbytes
        self.arena = Arena(num_regions * region_nbytes, False)
        self.memory = memoryview(self.arena)
        self.changed = threading.Condition()
        self.free = [number * region_nbytes for number in range(num_regions)]

    def acquire(self) -> Region:
        """Take a region; waits until one is free."""
        with self.changed:
            self.changed.wait_for(lambda: self.free)
            return Region(self, self.free.pop())

    def try_acquire(self) -> Region | None:
        """Take a region if one is free."""
        with self.changed:
            return Region(self, self.free.pop()) if self.free else None

    def close(self) -> None:
        """Let go of the memory, which lives as long as anybody reads it."""
        self.memory.release()
        del self.arena
