# SPDX-License-Identifier: Apache-2.0
"""Plain blocks on trial: in memory alone until they are used a second time, so that a disk is not worn by one-offs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from kvstore.errors import BusyError
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.host import HostTier
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.slots import copy_slot
from kvstore.tiers.writing.jobs import PutJob
from kvstore.tiers.writing.writer import Writer


class Trial:
    """Holds back the first `put` of a block; a second one, or a hit in memory, has it written. Thread-safe.

    Args:
        host: where blocks wait; one that is evicted there is gone.
        writer: writes those that passed.
    """

    def __init__(self, host: HostTier, writer: Writer) -> None:
        self._host = host
        self._writer = writer
        self._lock = threading.Lock()
        self._waiting: OrderedDict[BlockKey, int] = OrderedDict()  # tokens of each

    def hold(
        self, ticket: BatchTicket, keys: Sequence[BlockKey], slots: Sequence[Tensor], num_tokens: Sequence[int]
    ) -> list[int]:
        """Take in the blocks that are new; returns the items to be written: known ones, and those without room here."""
        rest: list[int] = []
        for item, key in enumerate(keys):
            lease = None if self._host.contains(key) else self._host.try_reserve(key)
            if lease is None:
                rest.append(item)
                with self._lock:
                    self._waiting.pop(key, None)
                continue
            with lease, ticket.claiming(item) as claim:
                if claim.is_held:
                    copy_slot(slots[item], lease.slot)
                    lease.publish()
                    self._note(key, num_tokens[item])
                    claim.outcome = Outcome.STORED
        return rest

    def passed(self, keys: Sequence[BlockKey]) -> None:
        """Queue those of some blocks, just found in memory, that wait for their second use."""
        if not self._waiting:
            return
        for key in keys:
            with self._lock:
                num_tokens = self._waiting.pop(key, None)
            lease = None if num_tokens is None else self._host.pin(key, is_use=False)
            if lease is None or num_tokens is None:
                continue
            job = PutJob(BatchTicket(1), [0], [key], [lease.slot], [num_tokens], (lease,))
            try:
                self._writer.put(job)
            except BusyError:  # the store closes: what is on trial is not kept anyway
                job.drop()

    def forget(self, key: BlockKey) -> bool:
        """Remove a block that waits; False when it does not, or has been evicted."""
        with self._lock:
            was_waiting = self._waiting.pop(key, None) is not None
        return was_waiting and self._host.forget(key)

    def _note(self, key: BlockKey, num_tokens: int) -> None:
        with self._lock:
            self._waiting[key] = num_tokens
            while len(self._waiting) > self._host.num_slots:  # the oldest have been evicted
                self._waiting.popitem(last=False)
