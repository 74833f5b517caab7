# SPDX-License-Identifier: Apache-2.0
"""What the remote tier asks of a key-value server: values move between the server and one piece of local memory."""

from __future__ import annotations

from collections.abc import Sequence
from mmap import mmap
from typing import NamedTuple, Protocol, TypeAlias

from kvstore.native import Arena
from kvstore.tiers.base import Outcome

Memory: TypeAlias = Arena | mmap
"""Where a link's values lie; a writable buffer."""


class Span(NamedTuple):
    """A range of a link's memory."""

    offset: int
    nbytes: int


class Link(Protocol):
    """One connection, used by one thread at a time. Keys are printable ASCII, at most 250 bytes.

    Every call ends some time after `deadline_s`, a reading of `time.monotonic`; how soon depends on the library behind
    it. It raises `StoreIOError` when the server cannot be reached, is too slow or breaks its protocol; the link is of
    no use then. What concerns one key is the outcome of that key.
    """

    def put(
        self, keys: Sequence[str], values: Sequence[Span], deadline_s: float, *, replace: bool = False
    ) -> list[Outcome]:
        """Store values, each at least one byte.

        Args:
            keys: one per value.
            values: where they lie in the link's memory.
            deadline_s: when to give up.
            replace: the values must take the place of what is there; otherwise either may win.

        Returns:
            Per key `STORED`, or `FULL` when the server has no room.
        """
        ...

    def get(self, keys: Sequence[str], rooms: Sequence[Span], deadline_s: float) -> list[int | Outcome]:
        """Fetch values into rooms of the link's memory.

        Returns:
            Per key the bytes of the value, `MISS`, or `DAMAGED` when there is no such value or it is too large.
        """
        ...

    def exists(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        """Say per key whether the server has a value."""
        ...

    def remove(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        """Forget values; says per key whether one was there and is gone."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class Transport(Protocol):
    """Makes links to one server or cluster. Thread-safe."""

    @property
    def place(self) -> str:
        """Where the server is, for messages; without passwords."""
        ...

    def connect(self, memory: Memory, deadline_s: float) -> Link:
        """Open a link whose values lie in `memory`; raises `StoreIOError`."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Make memory for links."""
        ...

    def free(self, memory: Memory) -> None:
        """Give memory back; no link uses it any more."""
        ...

    def close(self) -> None:
        """Release what all links share; no link is used any more."""
        ...
