# SPDX-License-Identifier: Apache-2.0
"""Moves submitted batches behind the caller's back: a few threads that fetch, and copies for puts that may not wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from kvstore.errors import BusyError
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.host import HostTier, Lease
from kvstore.tiers.moving.layer_load import LayerLoad
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.moving.trial import Trial
from kvstore.tiers.reading.fetcher import Fetcher
from kvstore.tiers.reading.request import FetchReport, FetchRequest
from kvstore.tiers.writing.jobs import PutJob
from kvstore.tiers.writing.writer import Writer

_NUM_THREADS = 4
_UNIT_NBYTES = 32 << 20
_MAX_PUT_BLOCKS = 32

Result = TypeVar("Result")


class Mover:
    """Owns the threads of submitted batches; `close` finishes what was submitted. Thread-safe.

    A batch is moved in units, and what has not begun can be cancelled: so many bytes of slots at a time.

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
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="kvstore-mover")

    def submit_get(self, requests: Sequence[FetchRequest], timeout_s: float | None) -> BatchTicket:
        """Bring blocks into slots; returns at once."""
        ticket = BatchTicket(len(requests), timeout_s)
        self._submit(self._get, requests, ticket)
        return ticket

    def fetch(self, requests: Sequence[FetchRequest], timeout_s: float) -> FetchReport:
        """Bring blocks into slots, those that come in time; the report of a batch that did not lacks what was read."""
        began_s = time.perf_counter()
        ticket = BatchTicket(len(requests), timeout_s)
        job = self._submit(self._fetcher.fetch, requests, ticket)
        outcomes = ticket.wait()
        assert outcomes is not None, "waited without a limit"
        if Outcome.TIMED_OUT not in outcomes:
            return job.result()
        late = [item for item, outcome in enumerate(outcomes) if outcome is Outcome.TIMED_OUT]
        reasons = dict.fromkeys(late, f"it did not come within {timeout_s} s")
        return FetchReport(outcomes, load_s=time.perf_counter() - began_s, reasons=reasons)

    def submit_put(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], num_tokens: Sequence[int], timeout_s: float | None
    ) -> BatchTicket:
        """Store blocks; returns at once.

        Without a deadline slots are encoded where they are. With one, blocks are copied to the host tier first, so that
        the slots are the caller's again when time is up, whatever the disk does.
        """
        assert self._writer is not None, "a store open for writing has a writer"
        keys, slots, num_tokens = tuple(keys), tuple(slots), tuple(num_tokens)  # the lists are the caller's
        ticket = BatchTicket(len(keys), timeout_s)
        items: Sequence[int] = range(len(keys))
        if self._trial is not None:
            items = self._trial.hold(ticket, keys, slots, num_tokens)
        if timeout_s is not None:
            self._submit(self._put_copies, self._writer, items, keys, slots, num_tokens, ticket)
        elif items:
            own = tuple(keys[item] for item in items), tuple(slots[item] for item in items)
            self._writer.put(PutJob(ticket, items, *own, tuple(num_tokens[item] for item in items)))
        return ticket

    def submit_layers(self, load: LayerLoad) -> None:
        """Bring the layers of a load; returns at once."""
        for _ in range(2):
            self._submit(load.run, self._fetcher)

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        self._threads.shutdown()

    def _submit(self, move: Callable[..., Result], *arguments: object) -> Future[Result]:
        try:
            return self._threads.submit(move, *arguments)
        except RuntimeError as error:  # the threads have been told to end
            raise BusyError("the store is closed") from error

    def _get(self, requests: Sequence[FetchRequest], ticket: BatchTicket) -> None:
        try:
            for first in range(0, len(requests), self._unit_blocks):
                if not ticket.done():
                    unit = range(first, min(first + self._unit_blocks, len(requests)))
                    self._fetcher.fetch(requests, ticket, unit)
        finally:
            ticket.settle_rest(Outcome.UNAVAILABLE)

    def _put_copies(
        self,
        writer: Writer,
        items: Sequence[int],
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        ticket: BatchTicket,
    ) -> None:
        waiting: list[tuple[int, Lease]] = []

        def hand_over() -> None:
            if not waiting:
                return
            copied, leases = [item for item, _ in waiting], tuple(lease for _, lease in waiting)
            waiting.clear()
            own = [keys[item] for item in copied]
            tokens = [num_tokens[item] for item in copied]
            job = PutJob(ticket, copied, own, [lease.slot for lease in leases], tokens, leases)
            try:
                writer.put(job)
            except BusyError:
                job.drop()

        for item in items:
            key = keys[item]
            lease = self._host.try_reserve(key) if len(waiting) < _MAX_PUT_BLOCKS else None
            if lease is None:  # hand over what has been copied: only the writer frees the slots that are waited for
                hand_over()
                lease = self._host.reserve_within(key, lambda: None, ticket.left_s)
            if lease is None:
                break
            if not ticket.claim(item):
                lease.release()
                break
            lease.slot.copy_(slots[item])
            ticket.unclaim(item, None)
            waiting.append((item, lease))
        hand_over()
