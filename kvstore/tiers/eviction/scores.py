# SPDX-License-Identifier: Apache-2.0
"""Policies by a score that fades: how often blocks are asked for, or how much attention they get."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

from kvstore.spec import BlockKey
from kvstore.tiers.eviction.policy import MayLeave

_RECENT_SHARE = 0.25


class FadingScores:
    """Sums per key that halve every `half_life` ticks, and who has the lowest.

    All scores fade alike, so their order changes only when one grows: each is kept as the logarithm of what it would be
    at tick 0, and a heap holds them; entries that a later score replaced are skipped.

    Args:
        half_life: ticks, above 0.
    """

    def __init__(self, half_life: float) -> None:
        self._rate = math.log(2) / half_life
        self._now = 0.0
        self._numbers = count()
        self._heap: list[tuple[float, int, BlockKey]] = []
        self._entries: dict[BlockKey, tuple[float, int]] = {}

    def tick(self) -> None:
        """Let time pass."""
        self._now += 1

    def score(self, key: BlockKey) -> float:
        """Return the score of a key at this tick; 0 for an unknown one."""
        return math.exp(self._entries[key][0] - self._rate * self._now) if key in self._entries else 0.0

    def grow(self, key: BlockKey, amount: float) -> None:
        """Add to a score."""
        total = self.score(key) + amount
        level = math.log(total) + self._rate * self._now if total > 0 else -math.inf
        self._enter(key, (level, next(self._numbers)))

    def drop(self, key: BlockKey) -> None:
        """Forget a key."""
        self._entries.pop(key, None)

    def pop_lowest(self, may_leave: MayLeave) -> tuple[BlockKey | None, list[BlockKey]]:
        """Take the lowest score off, of equal ones that which grew longest ago; None when no key may leave.

        Returns:
            The key, and those in front of it that may not leave: let them grow or drop them, else they are lost.
        """
        held: list[BlockKey] = []
        while self._heap:
            level, number, key = heapq.heappop(self._heap)
            if self._entries.get(key) != (level, number):
                continue
            if may_leave(key):
                del self._entries[key]
                return key, held
            held.append(key)
        return None, held

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._entries)

    def _enter(self, key: BlockKey, entry: tuple[float, int]) -> None:
        self._entries[key] = entry
        heapq.heappush(self._heap, (*entry, key))
        if len(self._heap) > 4 * len(self._entries) + 16:  # mostly replaced ones
            self._heap = [(*entry, key) for key, entry in self._entries.items()]
            heapq.heapify(self._heap)


class FadingLFU:
    """Least frequently used first, where old uses count less (as InfLLM keeps its units, arXiv:2402.04617).

    Args:
        capacity: blocks that the tier holds; a use counts half after as many uses as four times that.
    """

    def __init__(self, capacity: int) -> None:
        self._scores = FadingScores(4.0 * capacity)

    def add(self, key: BlockKey) -> None:
        """See `EvictionPolicy`; entering counts as one use."""
        self.use(key)

    def use(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        self._scores.tick()
        self._scores.grow(key, 1.0)

    def attend(self, key: BlockKey, mass: float) -> None:
        """Attention is no use: only who asks for a block matters."""

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        self._scores.drop(key)

    def victim(self, may_leave: MayLeave) -> BlockKey | None:
        """See `EvictionPolicy`."""
        found, held = self._scores.pop_lowest(may_leave)
        for key in held:
            self._scores.grow(key, 1.0)
        return found


class Participation:
    """Blocks that attention uses stay (after the participative compression of Deep Forcing, arXiv:2512.05081).

    The newest quarter stays whatever it got, as nothing has had the time to attend to it. Of the others the one that
    got the least attention leaves first.

    Args:
        capacity: blocks that the tier holds; attention counts half after as many notes of it as four times that.
    """

    def __init__(self, capacity: int) -> None:
        self._num_recent = max(1, int(_RECENT_SHARE * capacity))
        self._order: OrderedDict[BlockKey, None] = OrderedDict()  # the recent ones
        self._recent = FadingScores(4.0 * capacity)
        self._scores = FadingScores(4.0 * capacity)

    def add(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        self._enter(key, 0.0)

    def use(self, key: BlockKey) -> None:
        """Being fetched is no use: only attention counts."""

    def attend(self, key: BlockKey, mass: float) -> None:
        """See `EvictionPolicy`."""
        for scores in (self._recent, self._scores):
            scores.tick()
        (self._recent if key in self._order else self._scores).grow(key, mass)

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        self._order.pop(key, None)
        self._recent.drop(key)
        self._scores.drop(key)

    def victim(self, may_leave: MayLeave) -> BlockKey | None:
        """See `EvictionPolicy`."""
        found, held = self._scores.pop_lowest(may_leave)
        for key in held:
            score = self._scores.score(key)
            self._scores.drop(key)
            self._enter(key, score)
        if found is None:
            found = next((key for key in (*self._order, *self._scores) if may_leave(key)), None)
            if found is not None:
                self.remove(found)
        return found

    def _enter(self, key: BlockKey, score: float) -> None:
        """Make a block the newest; the eldest of the recent ones then stands on its score."""
        self._order[key] = None
        self._recent.grow(key, score)
        if len(self._order) > self._num_recent:
            eldest, _ = self._order.popitem(last=False)
            self._scores.grow(eldest, self._recent.score(eldest))
            self._recent.drop(eldest)
