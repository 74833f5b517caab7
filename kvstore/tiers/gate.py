# SPDX-License-Identifier: Apache-2.0
"""A shared/exclusive gate: many transactions pass together, a change of the memory map passes alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Any number inside, or one alone. Not reentrant while somebody waits for exclusive passage.

    Visitors have names, and `leave` may be called again: after an interrupt nobody knows whether the first call did it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # itself in `with`, unlike a condition, it is never left locked by an interrupt
        self._changed = threading.Condition(self._lock)
        self._inside: set[object] = set()
        self._alone: object | None = None

    def enter(self, visitor: object) -> None:
        """Go in beside others; waits while one is inside alone or waits to be."""
        with self._lock:
            self._changed.wait_for(lambda: self._alone is None)
            self._inside.add(visitor)

    def leave(self, visitor: object) -> None:
        """Undo `enter`, if there was one."""
        with self._lock:
            self._inside.discard(visitor)
            self._changed.notify_all()

    @contextmanager
    def visit(self) -> Iterator[object]:
        """Leave at the end of a `with` block, whoever entered inside it; yields the visitor."""
        visitor = object()
        try:
            try:
                yield visitor
            finally:
                self.leave(visitor)
        finally:
            self.leave(visitor)  # for good: an interrupt may have kept the first call from it

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until nobody is inside, keep newcomers out for the length of a `with` block."""
        alone = object()
        try:
            with self._lock:
                self._changed.wait_for(lambda: self._alone is None)
                self._alone = alone
                self._changed.wait_for(lambda: not self._inside)
            yield
        finally:
            with self._lock:
                if self._alone is alone:
                    self._alone = None
                self._changed.notify_all()

    @contextmanager
    def exclusive_if_empty(self) -> Iterator[bool]:
        """Like `exclusive`, but only if nobody is inside now; says whether. Whoever is inside may call it."""
        alone = object()
        try:
            try:
                with self._lock:
                    if self._alone is None and not self._inside:
                        self._alone = alone
                yield self._alone is alone
            finally:
                self._open_again(alone)
        finally:
            self._open_again(alone)  # for good, as in `visit`

    def _open_again(self, alone: object) -> None:
        with self._lock:
            if self._alone is alone:
                self._alone = None
                self._changed.notify_all()
