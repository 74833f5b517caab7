# SPDX-License-Identifier: Apache-2.0
"""The right to use one slot of the host tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from kvstore.spec import BlockKey


class Lender(Protocol):
    """The tier that slots belong to."""

    def publish_some(
        self, leases: Iterable[Lease], *, is_prefetched: bool = False, asked_at: int | None = None
    ) -> None:
        """`Lease.publish` of many."""
        ...

    def release_some(self, leases: Iterable[Lease]) -> None:
        """`Lease.release` of many."""
        ...


class Lease:
    """The right to use one host slot: while it is held the slot is not evicted. Release it exactly once.

    A slot that waits to be written to disk is simply one on which the writer holds a lease.
    """

    __slots__ = ("_lender", "_memory", "_slot_nbytes", "key", "owner", "slot_idx")

    def __init__(
        self, lender: Lender, key: BlockKey, slot_idx: int, memory: Tensor, slot_nbytes: int, owner: str
    ) -> None:
        self._lender = lender
        self.key = key
        self.owner = owner
        self.slot_idx = slot_idx
        self._memory = memory
        self._slot_nbytes = slot_nbytes

    @property
    def slot(self) -> Tensor:
        """[slot_nbytes] uint8 CPU."""
        start = self.slot_idx * self._slot_nbytes
        return self._memory[start : start + self._slot_nbytes]

    @property
    def address(self) -> int:
        """Where the slot is in memory, as long as the lease lives."""
        return self._memory.data_ptr() + self.slot_idx * self._slot_nbytes

    def publish(self, *, is_prefetched: bool = False, asked_at: int | None = None) -> None:
        """Let others find the block: its bytes are complete.

        Args:
            is_prefetched: whether nobody has asked for it yet.
            asked_at: what `HostTier.num_forgotten` was before the block was looked up elsewhere: if it was forgotten
                since then, it stays so. None for a block that is new.
        """
        self._lender.publish_some((self,), is_prefetched=is_prefetched, asked_at=asked_at)

    def release(self) -> None:
        """Give the slot up; a published block stays until its slot is needed."""
        self._lender.release_some((self,))

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
