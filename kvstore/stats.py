# SPDX-License-Identifier: Apache-2.0
"""Counters of a store: what each tier moved, held, found and missed, with units in the names."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from operator import add, attrgetter

from kvstore.telemetry.histogram import Histogram


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counts of one tier since the store was opened.

    `hits`, `misses`, `damaged`, `unavailable` count look-ups of blocks; `*_blocks` and `*_nbytes` count what moved;
    `shared_reads` count blocks that came with the read of another batch; of `prefetched_blocks` some were asked for
    afterwards, some left before anybody did, and some still wait for either; `*_s` are seconds summed over threads,
    so they may exceed wall time.
    """

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    unavailable: int = 0
    shared_reads: int = 0
    prefetched_blocks: int = 0
    prefetch_hits: int = 0
    prefetch_wasted: int = 0
    read_blocks: int = 0
    written_blocks: int = 0
    evicted_blocks: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0

    def __add__(self, other: TierStats) -> TierStats:
        return TierStats(*map(add, _COUNTS(self), _COUNTS(other)))


_COUNTS: Callable[[TierStats], tuple[float, ...]] = attrgetter(*(each.name for each in fields(TierStats)))


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Where a store's bytes on disk are.

    `extent_used_nbytes` is held by blocks, `extent_file_nbytes` is the size of the extent files (some of it is
    preallocated and free), `catalogue_nbytes` is the size of the catalogue file.
    """

    extent_used_nbytes: int
    extent_file_nbytes: int
    catalogue_nbytes: int

    @property
    def total_nbytes(self) -> int:
        """Bytes that the store takes from the file system."""
        return self.extent_file_nbytes + self.catalogue_nbytes


class BreakerState(StrEnum):
    """What a circuit breaker lets pass: `CLOSED` everything, `OPEN` nothing, `HALF_OPEN` one call, which decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """A snapshot of one remote tier.

    Args:
        tier: look-ups, and what moved.
        full: blocks that the server had no room for.
        timed_out: blocks whose time ran out, reads and writes.
        unavailable: blocks of calls that failed, or were not made since the breaker was open; reads and writes.
        breaker: what it does now.
        breaker_opened: how often it has opened.
        queued_offers: appended blocks that wait to be sent.
        dropped_offers: appended blocks that were not sent: the queue or the server was full, or the server failed.
        threads_left_behind: threads that hang in a call that nobody waits for any more.
    """

    tier: TierStats
    full: int
    timed_out: int
    unavailable: int
    breaker: BreakerState
    breaker_opened: int
    queued_offers: int
    dropped_offers: int
    threads_left_behind: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot of a store: its tiers, bytes on disk, and what waits to be written.

    `durations` says how long batches took, by tier and operation (`read`, `write`, `encode`, `decode`); where threads
    share an operation, the sum of their seconds counts. `remote` is None for a store that nothing stands behind.
    `num_objects` counts objects of streams, those that forks share once.
    """

    host: TierStats
    disk: TierStats
    usage: DiskUsage
    num_blocks: int
    num_streams: int
    host_slots: int
    host_slots_used: int
    queued_blocks: int
    durations: dict[tuple[str, str], Histogram] = field(default_factory=dict)
    remote: RemoteStats | None = None
    num_objects: int = 0


_TIMED = ("read", "write", "encode", "decode")


class Meter:
    """Adds up `TierStats` from several threads, and keeps how long batches took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = TierStats()
        self._durations: dict[str, Histogram] = {}

    def add(self, delta: TierStats) -> None:
        """Add what one batch did; the seconds in it count as one duration per operation."""
        with self._lock:
            self._total = self._total + delta
            for operation in _TIMED:
                seconds = getattr(delta, f"{operation}_s")
                if seconds > 0:
                    self._durations[operation] = self._durations.get(operation, Histogram()).with_one(seconds)

    def snapshot(self) -> TierStats:
        """Return the total so far, as a copy."""
        with self._lock:
            return replace(self._total)

    def durations(self) -> dict[str, Histogram]:
        """Return how long batches took, by operation, those there were."""
        with self._lock:
            return dict(self._durations)
