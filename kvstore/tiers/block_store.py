# SPDX-License-Identifier: Apache-2.0
"""The one interface of all that keeps blocks by key: memory, a store on disk, a remote tier, several in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome


class Ticket(Protocol):
    """The way to the outcomes of one submitted batch. Any thread may ask, wait or cancel."""

    def done(self) -> bool:
        """True when every block of the batch has its outcome; never blocks."""
        ...

    def wait(self, timeout_s: float | None = None) -> list[Outcome] | None:
        """Return one outcome per block, in order; None when `timeout_s` passed first and the batch goes on."""
        ...

    def cancel(self) -> None:
        """Stop what has not begun: its blocks end as `CANCELLED`. `wait` still tells when the slots are free again."""
        ...


class BlockStore(Protocol):
    """Keeps blocks by key. Thread-safe; batched; a fault concerns the item that has it, never the batch.

    Slots are [slot_nbytes] uint8 CPU, contiguous, of `layout`. They belong to the store until the call returns or the
    ticket is done. A wrong argument raises `ShapeError` before anything moves; what a medium does wrong is an outcome.
    """

    @property
    def layout(self) -> BlockLayout:
        """Layout of every slot."""
        ...

    def put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> list[Outcome]:
        """Store blocks; idempotent: a block that is there stays as it is and counts as `STORED`.

        Args:
            keys: one per block; a key names its content, so equal keys mean equal blocks.
            slots: the blocks.
            num_tokens: valid tokens in each.
            timeout_s: seconds after which what is unfinished ends as `TIMED_OUT`; None waits as long as the medium.
        """
        ...

    def get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> list[Outcome]:
        """Bring blocks into slots; see `put` for the arguments."""
        ...

    def submit_put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> Ticket:
        """Like `put`, and return at once."""
        ...

    def submit_get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> Ticket:
        """Like `get`, and return at once."""
        ...

    def exists(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Say per block whether it is there; does not count as a use. What cannot be asked is not there."""
        ...

    def remove(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Forget blocks; says per block whether it was there and is gone."""
        ...

    def close(self) -> None:
        """Finish what was submitted, then release everything; a second call does nothing."""
        ...
