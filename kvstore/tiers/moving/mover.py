# SPDX-License-Identifier: Apache-2.0
"""Moves submitted batches behind the caller's back, on lanes: what needs no device never waits behind what does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from kvstore.errors import BusyError
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.host import HostTier
from kvstore.tiers.moving.copied_put import CopiedPut
from kvstore.tiers.moving.layer_load import LayerLoad
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.moving.trial import Trial
from kvstore.tiers.reading.fetcher import Fetcher
from kvstore.tiers.reading.request import FetchReport, FetchRequest
from kvstore.tiers.writing.jobs import PutJob
from kvstore.tiers.writing.writer import Writer

_Result = TypeVar("_Result")
_NUM_READS = 4
_NUM_PUTS = 2
_UNIT_NBYTES = 32 << 20


class Mover:
    """Owns the threads of submitted batches; `close` finishes what was submitted. Thread-safe.

    There are three lanes: one for reads, whose threads may all be stuck on a device that stalls; one for puts, that may
    wait for a slot; and one for what the host tier has, that waits for nothing. A batch is read in units, and what has
    not begun can be cancelled: so many bytes of slots at a time.

    Args:
        host: where puts with a deadline leave copies.
        fetcher: brings blocks.
        writer: stores them; None for a reader.
        trial: holds first puts back; None where all are written.
        slot_nbytes: bytes of a slot.
    """

    def __init__(
        self, host: HostTier, fetcher: Fetcher, writer: Writer | None, trial: Trial | None, slot_nbytes: int
    ) -> None:
        self._host = host
        self._fetcher = fetcher
        self._writer = writer
        self._trial = trial
        self._unit_blocks = max(1, _UNIT_NBYTES // slot_nbytes)
        self._memory = ThreadPoolExecutor(1, thread_name_prefix="kvstore-mover-memory")
        self._reads = ThreadPoolExecutor(_NUM_READS, thread_name_prefix="kvstore-mover-read")
        self._puts = ThreadPoolExecutor(_NUM_PUTS, thread_name_prefix="kvstore-mover-put")

    def submit_get(self, requests: Sequence[FetchRequest], timeout_s: float | None) -> BatchTicket:
        """Bring blocks into slots; returns at once."""
        ticket = BatchTicket(len(requests), timeout_s)
        _submit(self._memory, lambda: self._begin(requests, ticket))
        return ticket

    def fetch(self, requests: Sequence[FetchRequest], timeout_s: float) -> FetchReport:
        """Bring blocks into slots, those that come in time; the report of a batch that did not lacks what was read."""
        began_s = time.perf_counter()
        ticket = BatchTicket(len(requests), timeout_s)
        try:
            report, reading = self._begin(requests, ticket)
            outcomes = ticket.outcomes()
        except BaseException:  # an interrupt: the caller has its slots back when this call ends
            ticket.cancel()
            ticket.outcomes()
            raise
        if Outcome.TIMED_OUT in outcomes:
            late = [item for item, outcome in enumerate(outcomes) if outcome is Outcome.TIMED_OUT]
            report = FetchReport(outcomes, reasons=dict.fromkeys(late, f"it did not come within {timeout_s:.3g} s"))
        elif reading is not None:
            report.add(reading.result())
        report.outcomes = outcomes
        report.load_s = time.perf_counter() - began_s
        return report

    def submit_put(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], num_tokens: Sequence[int], timeout_s: float | None
    ) -> BatchTicket:
        """Store blocks; returns at once.

        Without a deadline slots are encoded where they are. With one, blocks are copied to the host tier first, so that
        the slots are the caller's again when time is up, whatever the disk does.
        """
        writer = self._writer
        assert writer is not None, "a store open for writing has a writer"
        keys, slots, num_tokens = tuple(keys), tuple(slots), tuple(num_tokens)  # the lists are the caller's
        ticket = BatchTicket(len(keys), timeout_s, on_cancel=self._host.wake)
        items: Sequence[int] = range(len(keys))
        if self._trial is not None:
            items = self._trial.hold(ticket, keys, slots, num_tokens)
        if timeout_s is not None:
            put = CopiedPut(self._host, writer, ticket, items, keys, slots, num_tokens)
            _submit(self._puts, put.run)
        elif items:
            own = tuple(keys[item] for item in items), tuple(slots[item] for item in items)
            writer.put(PutJob(ticket, items, *own, tuple(num_tokens[item] for item in items)))
        return ticket

    def submit_layers(self, load: LayerLoad) -> None:
        """Bring the layers of a load; returns at once."""
        for _ in range(2):
            _submit(self._reads, lambda: load.run(self._fetcher))

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        for lane in (self._memory, self._reads, self._puts):  # the first one feeds the second
            lane.shutdown()

    def _begin(
        self, requests: Sequence[FetchRequest], ticket: BatchTicket
    ) -> tuple[FetchReport, Future[FetchReport] | None]:
        """Copy what is in memory, queue what has to be read; returns how the first went and the way to the second."""
        try:
            report = self._fetcher.fetch_from_memory(requests, ticket)
            rest = [item for item in range(len(requests)) if ticket.is_open(item)]
            return report, _submit(self._reads, lambda: self._read(requests, ticket, rest)) if rest else None
        except BaseException:
            ticket.settle_rest(Outcome.UNAVAILABLE)
            raise

    def _read(self, requests: Sequence[FetchRequest], ticket: BatchTicket, items: Sequence[int]) -> FetchReport:
        report = FetchReport([])
        try:
            for first in range(0, len(items), self._unit_blocks):
                unit = [item for item in items[first : first + self._unit_blocks] if ticket.is_open(item)]
                if unit:
                    report.add(self._fetcher.fetch(requests, ticket, unit))
        finally:
            ticket.settle_rest(Outcome.UNAVAILABLE)
        return report


def _submit(lane: ThreadPoolExecutor, work: Callable[[], _Result]) -> Future[_Result]:
    try:
        return lane.submit(work)
    except RuntimeError:
        raise BusyError("the store is closed") from None
