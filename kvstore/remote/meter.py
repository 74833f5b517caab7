# SPDX-License-Identifier: Apache-2.0
"""Counters of a remote tier: what moved, how calls ended, and what the breaker does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

from kvstore.remote.breaker import BreakerState
from kvstore.stats import Meter, TierStats
from kvstore.tiers.base import Outcome


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """A snapshot of one remote tier.

    Args:
        tier: look-ups, and what moved.
        full: blocks that the server had no room for.
        timed_out: blocks whose time ran out, reads and writes.
        unavailable: blocks of calls that failed, or were not made since the breaker was open.
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


class RemoteMeter:
    """Adds up what happens to blocks. Thread-safe."""

    def __init__(self) -> None:
        self.tier = Meter()
        self._lock = Lock()
        self._ends: Counter[Outcome] = Counter()

    def count_reads(self, outcomes: Iterable[Outcome]) -> None:
        """Count how the reads of one batch ended."""
        ends = Counter(outcomes)
        self.tier.add(TierStats(hits=ends[Outcome.REMOTE], misses=ends[Outcome.MISS], damaged=ends[Outcome.DAMAGED]))
        self._add(ends)

    def count_writes(self, outcomes: Iterable[Outcome]) -> None:
        """Count how the writes of one batch ended."""
        self._add(Counter(outcomes))

    def ends(self, outcome: Outcome) -> int:
        """How many blocks have ended so."""
        with self._lock:
            return self._ends[outcome]

    def _add(self, ends: Counter[Outcome]) -> None:
        with self._lock:
            self._ends += ends
