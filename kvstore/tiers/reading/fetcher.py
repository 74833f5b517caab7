# SPDX-License-Identifier: Apache-2.0
"""Moves blocks from disk and host into the slots of callers; a block that several want at once is read once.

A fault concerns the item that has it, never the batch. Bytes land in staging memory; a slot is written only while its
item is claimed, so a read that comes too late never touches it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from torch import Tensor

from kvstore.errors import BusyError, KVStoreError
from kvstore.layout import BlockLayout
from kvstore.native import IoPool
from kvstore.spec import BlockKey
from kvstore.stats import Meter, TierStats
from kvstore.telemetry.tracing import span
from kvstore.tiers.base import Outcome, Tier
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.eviction.admission import Doorkeeper
from kvstore.tiers.host import HostTier
from kvstore.tiers.moving.backing import Backing
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.reading.behind import read_behind
from kvstore.tiers.reading.block_reader import BlockReader, Sought
from kvstore.tiers.reading.delivery import Delivery
from kvstore.tiers.reading.flights import Flight, Flights, Seat, Wanted
from kvstore.tiers.reading.host_copies import HostCopies
from kvstore.tiers.reading.request import FetchReport, FetchRequest


@dataclass(slots=True)
class _Batch:
    requests: Sequence[FetchRequest]
    ticket: BatchTicket
    report: FetchReport
    is_kept: bool
    num_read: int = 0
    num_shared: int = 0


class Fetcher:
    """Fetches batches of blocks. Thread-safe.

    Args:
        disk: the disk tier.
        host: the host tier: serves what it holds, takes what was read whole.
        codecs: decode.
        layout: layout of the destination slots.
        pool: moves the bytes.
        decoders: threads that decode.
        backing: asked for what the disk does not have.
    """

    def __init__(
        self,
        disk: DiskTier,
        host: HostTier,
        codecs: CodecShelf,
        layout: BlockLayout,
        pool: IoPool,
        decoders: Executor,
        backing: Backing | None = None,
    ) -> None:
        self._disk = disk
        self._host = host
        self._layout = layout
        self._backing = backing
        self._reader = BlockReader(disk, codecs, layout, pool, decoders)
        self._copies = HostCopies(host, layout, Doorkeeper(disk.config.host.admission, host.num_slots))
        self._flights = Flights()
        self._lock = threading.Lock()  # in `with`, as in `BatchTicket`
        self._changed = threading.Condition(self._lock)
        self._demands: set[object] = set()  # fetches under way
        self._is_closing = False
        self._is_closed = False
        self.host_meter = Meter()
        self.on_host_hits: Callable[[Sequence[BlockKey]], None] | None = None
        """Called after a fetch with the blocks that were found in memory."""

    @property
    def damaged(self) -> set[BlockKey]:
        """Blocks seen damaged: the writer replaces them when they are appended again."""
        return self._reader.damaged

    def fetch(
        self,
        requests: Sequence[FetchRequest],
        ticket: BatchTicket | None = None,
        positions: Sequence[int] | None = None,
    ) -> FetchReport:
        """Bring blocks into their slots; see `Store.fetch`.

        Args:
            requests: a batch.
            ticket: one item per request.
            positions: which requests to serve now, None for all; they have their outcomes on return, however it ends.

        Raises:
            BusyError: the store is closed.
        """
        served = range(len(requests)) if positions is None else positions
        demand = object()
        try:
            with self._lock:
                if self._is_closed:
                    raise BusyError("the store is closed")
                self._demands.add(demand)
            return self._fetch(requests, served, ticket or BatchTicket(len(requests)), is_kept=True)
        finally:
            with self._lock:
                self._demands.discard(demand)
                self._changed.notify_all()

    def fetch_from_memory(self, requests: Sequence[FetchRequest], ticket: BatchTicket) -> FetchReport:
        """Bring those blocks into their slots that the host tier holds, which waits for nothing."""
        report = FetchReport([])
        batch = _Batch(requests, ticket, report, is_kept=True)
        left = set(self._copy_from_host(batch, range(len(requests))))
        served = [position for position in range(len(requests)) if position not in left]
        report.outcomes = ticket.peek(served)
        self._account(batch, served)
        return report

    def prefetch(self, requests: Sequence[FetchRequest], ticket: BatchTicket) -> FetchReport:
        """Like `fetch`, into slots of the host tier: neither a use of the blocks nor a look-up that hits or misses."""
        return self._fetch(requests, range(len(requests)), ticket, is_kept=False)

    def wait_for_demand(self) -> None:
        """Wait until no `fetch` is under way."""
        with self._lock:
            self._changed.wait_for(lambda: not self._demands or self._is_closing)

    def stop_waiting(self) -> None:
        """Let nobody wait in `wait_for_demand` any more: the store closes."""
        with self._lock:
            self._is_closing = True
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse new calls, wait for those under way, then give the staging memory back."""
        with self._lock:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._demands)
        self._reader.close()

    def _fetch(
        self, requests: Sequence[FetchRequest], positions: Sequence[int], ticket: BatchTicket, *, is_kept: bool
    ) -> FetchReport:
        began_s = time.perf_counter()
        report = FetchReport([])
        batch = _Batch(requests, ticket, report, is_kept)
        try:
            with span("kvstore.fetch" if is_kept else "kvstore.prefetch", blocks=len(positions)):
                self._bring(batch, positions)
        except KVStoreError as error:  # the catalogue cannot be read: nothing is known of what is still open
            report.reasons.update({item: str(error) for item in positions if ticket.is_open(item)})
        finally:  # also when a thread dies of a bug: nobody is left waiting
            report.outcomes = ticket.settle_rest(Outcome.UNAVAILABLE, positions)
        report.load_s = time.perf_counter() - began_s
        self._account(batch, positions)
        return report

    def _account(self, batch: _Batch, served: Sequence[int]) -> None:
        """Count how some items of a batch ended, and note the uses of their blocks."""
        report, outcomes = batch.report, batch.report.outcomes
        counts = Counter(outcomes)
        num_host = counts[Outcome.HOST]
        is_use = batch.is_kept
        self._disk.meter.add(
            TierStats(
                hits=counts[Outcome.DISK] if is_use else 0,
                misses=counts[Outcome.MISS] if is_use else 0,
                damaged=counts[Outcome.DAMAGED],
                unavailable=counts[Outcome.UNAVAILABLE],
                shared_reads=batch.num_shared,
                read_blocks=batch.num_read,
                read_nbytes=report.bytes_read[Tier.DISK],
                read_s=report.load_s if report.bytes_read[Tier.DISK] else 0.0,
                decode_s=report.decode_s,
            )
        )
        if not is_use:
            return
        self.host_meter.add(
            TierStats(
                hits=num_host,
                misses=len(served) - num_host,
                read_blocks=num_host,
                read_nbytes=report.bytes_read[Tier.HOST],
            )
        )
        if self._disk.is_writable:
            keys = [batch.requests[position].key for position in served]
            if self.on_host_hits is not None and num_host:
                self.on_host_hits([key for key, end in zip(keys, outcomes, strict=True) if end is Outcome.HOST])
            self._disk.note_use(key for key, end in zip(keys, outcomes, strict=True) if end.is_hit)

    def _bring(self, batch: _Batch, positions: Sequence[int]) -> None:
        # Nobody waits any more for what has ended: reading it would only hold up those who do.
        wanted = self._copy_from_host(batch, batch.ticket.open_items(positions))
        while wanted:  # again for those that waited for another batch in vain
            wanted = batch.ticket.open_items(self._fetch_from_disk(batch, wanted))
            wanted = self._copy_from_host(batch, wanted)

    def _copy_from_host(self, batch: _Batch, positions: Sequence[int]) -> list[int]:
        """Serve what is in memory; returns the others."""
        left, nbytes = self._copies.serve(batch.requests, batch.ticket, positions)
        batch.report.bytes_read[Tier.HOST] += nbytes
        return left

    def _fetch_from_disk(self, batch: _Batch, positions: Sequence[int]) -> list[int]:
        """Read what nobody else is reading, then wait for what others read; returns those that others failed at."""
        own: dict[int, Sought] = {}
        flights: dict[int, Flight] = {}
        others: dict[int, Flight] = {}
        requests, num_layers = batch.requests, self._layout.spec.num_layers
        wanted: list[tuple[Wanted, Seat]] = []
        for position in positions:
            key, slot, layers, _ = requests[position]
            is_whole = layers is None or len(layers) == num_layers
            wanted.append(((key, None if is_whole else layers), Seat(batch.ticket, position, slot)))
        asked_at = self._host.num_forgotten
        boarded: list[tuple[Flight, bool]] = []
        try:
            self._flights.board(wanted, boarded)
            for position, (flight, is_first) in zip(positions, boarded, strict=True):
                if is_first:
                    own[position], flights[position] = Sought(*flight.wanted), flight
                else:
                    others[position] = flight
            landed = self._host.present([item.key for item in own.values()])  # since the look into the host tier
            if any(landed):
                found = [position for position, is_there in zip(own, landed, strict=True) if is_there]
                for position in set(found).difference(self._copy_from_host(batch, found)):
                    del own[position]
            self._read(batch, own, flights, asked_at)
        finally:
            self._flights.end([flight for flight, is_first in boarded if is_first])
        for flight in others.values():
            self._flights.wait(flight, batch.ticket.left_s)
        return list(others)

    def _owners(self, batch: _Batch, items: Mapping[int, Sought]) -> dict[int, str]:
        """Owners of the blocks that are read whole and enter the host tier."""
        if not batch.is_kept:
            return {}
        owners = {position: batch.requests[position].owner for position, item in items.items() if item.layers is None}
        entering = self._copies.entering([(items[position].key, owner) for position, owner in owners.items()])
        return {position: owner for (position, owner), enters in zip(owners.items(), entering, strict=True) if enters}

    def _read(self, batch: _Batch, items: dict[int, Sought], flights: dict[int, Flight], asked_at: int) -> None:
        delivery = Delivery(self._copies, self._flights, items, flights, self._owners(batch, items), asked_at)
        if items:
            cost = self._reader.read(items, lambda numbers, decode: delivery.deliver(numbers, decode, Outcome.DISK))
            batch.report.bytes_read[Tier.DISK] += cost.nbytes
            batch.report.decode_s += cost.decode_s
        if self._backing is not None:

            def deliver_copy(position: int, block: Tensor) -> None:
                def copy(slots: Mapping[int, Tensor]) -> list[int]:
                    for number, slot in slots.items():
                        self._copies.copy(block, slot, items[number].layers)
                    return list(slots)

                delivery.deliver([position], copy, Outcome.REMOTE)

            came = read_behind(self._backing, self._layout, items, lambda: batch.ticket.left_s, deliver_copy)
            batch.report.bytes_read[Tier.REMOTE] += came
        for position, item in items.items():
            if item.outcome is not None:
                if item.outcome is not Outcome.MISS:
                    batch.report.reasons[position] = str(item.fault)
                batch.ticket.settle(position, item.outcome)
        batch.num_read += sum(item.is_delivered for item in items.values())
        batch.num_shared += len(delivery.shared)
