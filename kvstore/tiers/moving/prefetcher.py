# SPDX-License-Identifier: Apache-2.0
"""Prefetch: brings blocks into the host tier while nobody waits for the disk, most wanted first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from kvstore.spec import BlockKey
from kvstore.stats import TierStats
from kvstore.telemetry.fault_log import log_fault
from kvstore.tiers.base import Outcome
from kvstore.tiers.host import HostTier, Lease
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.reading.fetcher import Fetcher
from kvstore.tiers.reading.request import FetchRequest

_UNIT_NBYTES = 4 << 20


class Prefetcher:
    """Owns the thread that prefetches, in units of a few blocks. Thread-safe.

    A unit begins only while no demand is being served, so demand waits for one unit at most. As many blocks can wait as
    the host tier has slots: more could not stay anyway.

    Args:
        host: where blocks go.
        fetcher: brings them.
        slot_nbytes: bytes of a slot.
    """

    def __init__(self, host: HostTier, fetcher: Fetcher, slot_nbytes: int) -> None:
        self._host = host
        self._fetcher = fetcher
        self._unit_blocks = max(1, _UNIT_NBYTES // slot_nbytes)
        self._lock = threading.Lock()
        self._numbers = count()
        self._waiting: list[tuple[int, int, BlockKey, BatchTicket, int]] = []
        self._is_running = False
        self._is_closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-prefetch")

    def submit(self, keys: Sequence[BlockKey], priority: int) -> BatchTicket:
        """Queue blocks; see `Store.prefetch`."""
        ticket = BatchTicket(len(keys))
        with self._lock:
            for item, key in enumerate(keys):
                if self._host.contains(key):
                    ticket.settle(item, Outcome.HOST)
                elif self._is_closed or not self._has_room():
                    ticket.settle(item, Outcome.FULL)
                else:
                    heapq.heappush(self._waiting, (-priority, next(self._numbers), key, ticket, item))
            if self._waiting and not self._is_running:
                self._is_running = True
                self._thread.submit(self._run)
        return ticket

    def close(self) -> None:
        """Cancel what has not begun and end the thread."""
        with self._lock:
            self._is_closed = True
            for *_, ticket, item in self._waiting:
                ticket.settle(item, Outcome.CANCELLED)
            self._waiting.clear()
        self._fetcher.stop_waiting()
        self._thread.shutdown()

    def _has_room(self) -> bool:
        if len(self._waiting) >= self._host.num_slots:  # some may have been cancelled
            self._waiting = [wish for wish in self._waiting if wish[3].is_open(wish[4])]
            heapq.heapify(self._waiting)
        return len(self._waiting) < self._host.num_slots

    def _run(self) -> None:
        """Bring units until none is left; each goes behind all demand."""
        while True:
            self._fetcher.wait_for_demand()
            with self._lock:
                unit: list[tuple[BlockKey, BatchTicket, int]] = []
                while self._waiting and len(unit) < self._unit_blocks:
                    *_, key, ticket, item = heapq.heappop(self._waiting)
                    if ticket.is_open(item):
                        unit.append((key, ticket, item))
                if not unit:
                    self._is_running = False
                    return
            try:
                self._bring(unit)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end prefetching for good
                log_fault("blocks not prefetched", blocks=len(unit), reason=repr(error))
            finally:
                for _, ticket, item in unit:
                    ticket.settle(item, Outcome.UNAVAILABLE)  # nobody waits for ever, whatever went wrong

    def _bring(self, unit: Sequence[tuple[BlockKey, BatchTicket, int]]) -> None:
        coming: list[tuple[Lease, BatchTicket, int]] = []
        asked_at = self._host.num_forgotten
        for key, ticket, item in unit:
            if self._host.contains(key):
                ticket.settle(item, Outcome.HOST)
                continue
            lease = self._host.try_reserve(key)
            if lease is None:
                ticket.settle(item, Outcome.FULL)
            else:
                coming.append((lease, ticket, item))
        try:
            requests = [FetchRequest(lease.key, lease.slot) for lease, _, _ in coming]
            outcomes = self._fetcher.prefetch(requests, BatchTicket(len(requests))).outcomes
            num_brought = 0
            for (lease, ticket, item), outcome in zip(coming, outcomes, strict=True):
                if outcome in (Outcome.DISK, Outcome.REMOTE):
                    lease.publish(is_prefetched=True, asked_at=asked_at)
                    num_brought += 1
                ticket.settle(item, outcome)
            self._fetcher.host_meter.add(TierStats(prefetched_blocks=num_brought))
        finally:
            for lease, _, _ in coming:
                lease.release()
