# SPDX-License-Identifier: Apache-2.0
"""One put that may not keep its caller: blocks are copied to the host tier, and written from there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvstore.errors import BusyError
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.host import HostTier, Lease
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.slots import copy_slot
from kvstore.tiers.writing.jobs import PutJob
from kvstore.tiers.writing.writer import Writer

_MAX_JOB_BLOCKS = 32


class CopiedPut:
    """Copies slots for as long as there is room and anybody waits, and hands the copies to the writer.

    Args:
        host: where the copies lie until they are written.
        writer: writes them.
        ticket: one item per key.
        items: which of them to store.
        keys: of the blocks.
        slots: the caller's.
        num_tokens: tokens in each.
    """

    def __init__(
        self,
        host: HostTier,
        writer: Writer,
        ticket: BatchTicket,
        items: Sequence[int],
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
    ) -> None:
        self._host = host
        self._writer = writer
        self._ticket = ticket
        self._items = items
        self._keys = keys
        self._slots = slots
        self._num_tokens = num_tokens
        self._copied: dict[int, Lease] = {}

    def run(self) -> None:
        """Copy and hand over; ends when the ticket does."""
        num_begun = 0
        try:
            for item in self._items:
                if not self._copy(item):
                    break
                num_begun += 1
            self._hand_over()
        finally:
            lost = [*self._copied, *self._items[num_begun:]]  # by a bug, or because nobody waits any more
            for lease in self._copied.values():
                lease.release()
            for item in lost:
                self._ticket.settle(item, Outcome.UNAVAILABLE)

    def _copy(self, item: int) -> bool:
        """True when a copy waits to be handed over, False when it is not wanted any more."""
        key = self._keys[item]
        lease = self._host.try_reserve(key) if len(self._copied) < _MAX_JOB_BLOCKS else None
        if lease is None:  # hand over what has been copied: only the writer frees the slots that are waited for
            self._hand_over()
            lease = self._host.reserve_within(key, lambda: self._ticket.left_s)
        if lease is None:
            return False
        try:
            with self._ticket.claiming(item) as claim:
                if not claim.is_held:
                    return False
                copy_slot(self._slots[item], lease.slot)
            self._copied[item] = lease
        finally:
            if item not in self._copied:
                lease.release()
        return True

    def _hand_over(self) -> None:
        if not self._copied:
            return
        copied, self._copied = self._copied, {}
        items, leases = list(copied), tuple(copied.values())
        keys = [self._keys[item] for item in items]
        job = PutJob(
            self._ticket, items, keys, [lease.slot for lease in leases], [self._num_tokens[i] for i in items], leases
        )
        try:
            self._writer.put(job)
        except BusyError:
            job.drop()
