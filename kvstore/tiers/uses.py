# SPDX-License-Identifier: Apache-2.0
"""Uses of blocks that wait for the next commit, which writes them to the order of eviction."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import islice

from kvstore.spec import BlockKey

_MAX_USES = 65536


class Uses:
    """Remembers the last uses, each with the stamp of its time. Thread-safe.

    Args:
        stamps: unique and rising; also drawn from by others.
    """

    def __init__(self, stamps: Iterator[int]) -> None:
        self._stamps = stamps
        self._last: dict[BlockKey, int] = {}
        self._lock = threading.Lock()

    def note(self, keys: Iterable[BlockKey]) -> None:
        """These were used now, in this order."""
        with self._lock:
            for key in keys:
                self._last.pop(key, None)
                self._last[key] = next(self._stamps)
            while len(self._last) > _MAX_USES:
                del self._last[next(iter(self._last))]

    def take(self, most: int) -> list[tuple[BlockKey, int]]:
        """Take what was noted with its stamps, oldest first and not more than `most`."""
        with self._lock:
            keys = list(islice(self._last, most))
            return [(key, self._last.pop(key)) for key in keys]
