# SPDX-License-Identifier: Apache-2.0
"""Lets go of a mapped file's pages: what was looked at once stays resident, of a large file in the end all of it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

from kvstore.tiers.gate import Gate

_CHECK_EVERY = 16
_MOST_NBYTES = 8 << 20
_STATM = Path("/proc/self/statm")


class MappedPages:
    """Has a map made anew when more than 8 MiB of mapped files were brought in since the last time.

    Args:
        gate: users of the map are inside; it is made anew when nobody is.
        map_anew: makes it.
    """

    def __init__(self, gate: Gate, map_anew: Callable[[], None]) -> None:
        self._gate = gate
        self._map_anew = map_anew
        self._num_calls = 0
        self._is_due = False
        self._kept_nbytes = _mapped_nbytes()

    def note_call(self) -> None:
        """Somebody looked at pages: `let_go` every 16th time, and again until nobody is in the way.

        Threads may count wrongly, which does no harm.
        """
        self._num_calls += 1
        if self._is_due or self._num_calls % _CHECK_EVERY == 0:
            self.let_go()

    def let_go(self) -> None:
        """Have the map made anew if too much of it is there, and nobody is inside."""
        if _mapped_nbytes() - self._kept_nbytes <= _MOST_NBYTES:
            return
        with self._gate.exclusive_if_empty() as is_alone:
            self._is_due = not is_alone
            if is_alone:
                self._map_anew()
                self._kept_nbytes = _mapped_nbytes()  # libraries, and what others mapped


def _mapped_nbytes() -> int:
    """Resident bytes of all mapped files; 0 where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[2]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0
