# SPDX-License-Identifier: Apache-2.0
"""A shared/exclusive gate: many transactions pass together, a change of the memory map passes alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Any number inside, or one alone. Not reentrant while somebody waits for exclusive passage."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_closed = False

    def enter(self) -> None:
        """Go in beside others; waits while one is inside alone or waits to be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._inside += 1

    def leave(self) -> None:
        """Undo one `enter`."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """`enter` and `leave` around a `with` block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until nobody is inside, keep newcomers out for the length of a `with` block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()
