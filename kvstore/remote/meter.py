# SPDX-License-Identifier: Apache-2.0
"""Counters of a remote tier: what moved, and how blocks ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from threading import Lock

from kvstore.stats import Meter, TierStats
from kvstore.tiers.base import Outcome


class RemoteMeter:
    """Adds up what happens to blocks. Thread-safe."""

    def __init__(self) -> None:
        self.tier = Meter()
        self._lock = Lock()
        self._ends: Counter[Outcome] = Counter()

    def count_reads(self, outcomes: Iterable[Outcome]) -> None:
        """Count how the reads of one batch ended."""
        ends = Counter(outcomes)
        hits, misses, damaged = (ends[each] for each in (Outcome.REMOTE, Outcome.MISS, Outcome.DAMAGED))
        self.tier.add(TierStats(hits=hits, misses=misses, damaged=damaged, unavailable=ends[Outcome.UNAVAILABLE]))
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
