# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: each against a plain reference on random traces, and what all of them promise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pytest

from kvstore.config import Eviction
from kvstore.spec import BlockKey
from kvstore.tiers.eviction.partitions import make_policy
from tests.store_blocks import block_key

KEYS = [block_key(number) for number in range(200)]
SIZES = [1, 2, 3, 10, 37, 100]


class Reference(Protocol):
    """A cache as simple as can be: returns whether a key was there."""

    def ask(self, key: BlockKey) -> bool: ...


@dataclass
class PlainLRU:
    size: int
    order: list[BlockKey] = field(default_factory=list)

    def ask(self, key: BlockKey) -> bool:
        hit = key in self.order
        if hit:
            self.order.remove(key)
        elif len(self.order) == self.size:
            self.order.pop(0)
        self.order.append(key)
        return hit


@dataclass
class PlainS3FIFO:
    """Algorithm 1 of the paper, with lists: heads at the right end."""

    size: int
    small: list[BlockKey] = field(default_factory=list)
    main: list[BlockKey] = field(default_factory=list)
    ghost: list[BlockKey] = field(default_factory=list)
    uses: dict[BlockKey, int] = field(default_factory=dict)

    def ask(self, key: BlockKey) -> bool:
        if key in self.small or key in self.main:
            self.uses[key] = min(self.uses[key] + 1, 3)
            return True
        while len(self.small) + len(self.main) >= self.size:
            if len(self.small) >= max(1, int(0.1 * self.size)) or not self.main:
                self.evict_small()
            else:
                self.evict_main()
        self.uses[key] = 0
        if key in self.ghost:
            self.ghost.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)
        return False

    def evict_small(self) -> None:
        tail = self.small.pop(0)
        if self.uses[tail] > 1:
            self.uses[tail] = 0
            self.main.append(tail)
            return
        self.ghost.append(tail)
        if len(self.ghost) > max(1, self.size - max(1, int(0.1 * self.size))):
            self.ghost.pop(0)

    def evict_main(self) -> None:
        tail = self.main.pop(0)
        if self.uses[tail] > 0:
            self.uses[tail] -= 1
            self.main.append(tail)


@dataclass
class PlainLFU:
    """Keeps when every block was asked for, and sums the faded uses anew each time."""

    size: int
    now: int = 0
    uses: dict[BlockKey, list[int]] = field(default_factory=dict)

    def ask(self, key: BlockKey) -> bool:
        hit = key in self.uses
        if not hit and len(self.uses) == self.size:
            lowest = min(self.uses, key=lambda other: (self.score(other), self.uses[other][-1]))
            del self.uses[lowest]
        self.now += 1
        self.uses.setdefault(key, []).append(self.now)
        return hit

    def score(self, key: BlockKey) -> float:
        return sum(math.exp2((then - self.now) / (4 * self.size)) for then in self.uses[key])


class Cache:
    """A tier of keys alone, under a policy."""

    def __init__(self, eviction: Eviction, size: int) -> None:
        self.policy = make_policy(eviction, size)
        self.size = size
        self.held: set[BlockKey] = set()
        self.leased: set[BlockKey] = set()

    def ask(self, key: BlockKey) -> bool:
        if key in self.held:
            self.policy.use(key)
            return True
        if len(self.held) == self.size:
            victim = self.policy.victim(lambda other: other not in self.leased)
            if victim is None:
                return False
            self.held.remove(victim)
        self.held.add(key)
        self.policy.add(key)
        return False


def _trace(seed: int, length: int = 3000) -> Iterator[BlockKey]:
    """Skewed uses, with scans and loops in between."""
    rng = random.Random(seed)
    while length > 0:
        match rng.randrange(4):
            case 0:
                first, span = rng.randrange(150), rng.randrange(50)
                part = KEYS[first : first + span]
            case 1:
                part = KEYS[: rng.randrange(1, 40)] * 2
            case _:
                part = [KEYS[int(len(KEYS) * rng.random() ** 3)] for _ in range(60)]
        yield from part
        length -= len(part)


REFERENCES: dict[Eviction, Callable[[int], Reference]] = {
    Eviction.LRU: PlainLRU,
    Eviction.S3_FIFO: PlainS3FIFO,
    Eviction.LFU: PlainLFU,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eviction", REFERENCES)
def test_a_policy_does_what_its_plain_reference_does(eviction: Eviction, size: int) -> None:
    for seed in range(3):
        cache, reference = Cache(eviction, size), REFERENCES[eviction](size)
        for step, key in enumerate(_trace(seed)):
            assert cache.ask(key) == reference.ask(key), f"seed {seed}, step {step}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eviction", Eviction)
def test_nothing_leased_leaves_and_the_tier_never_overflows(eviction: Eviction, size: int) -> None:
    rng = random.Random(size)
    cache = Cache(eviction, size)
    for key in _trace(7):
        before = set(cache.held)
        cache.ask(key)
        assert len(cache.held) <= size
        assert not (before - cache.held) & cache.leased
        assert cache.held >= cache.leased
        share = rng.choice((0.3, 0.3, 0.95, 1.0))
        cache.leased = {other for other in cache.held if rng.random() < share}
        if cache.held - cache.leased and rng.random() < 0.05:
            gone = rng.choice(sorted(cache.held - cache.leased))
            cache.policy.remove(gone)
            cache.held.remove(gone)
        if rng.random() < 0.2 and cache.held:
            cache.policy.attend(rng.choice(sorted(cache.held)), rng.random())


@pytest.mark.parametrize("eviction", Eviction)
def test_leased_blocks_are_not_looked_at_again_and_again(eviction: Eviction) -> None:
    size, num_asked = 400, 0
    policy = make_policy(eviction, size)
    keys = [block_key(1000 + number) for number in range(2 * size)]
    leased = set(keys[: size // 2])

    def may_leave(key: BlockKey) -> bool:
        nonlocal num_asked
        num_asked += 1
        return key not in leased

    for key in keys[:size]:
        policy.add(key)
    for key in keys[size:]:
        assert policy.victim(may_leave) is not None
        policy.add(key)
    assert num_asked < 8 * size, "a full queue of unwritten blocks must not slow every append down"


@pytest.mark.parametrize("size", [8, 100])
@pytest.mark.parametrize("eviction", Eviction)
def test_the_last_block_that_may_leave_is_found(eviction: Eviction, size: int) -> None:
    for alone in (*range(8), size - 1):
        cache = Cache(eviction, size)
        for key in KEYS[:size]:
            cache.ask(key)
        for _ in range(5):
            cache.ask(KEYS[alone])
            cache.policy.attend(KEYS[alone], 1.0)
        cache.leased = set(KEYS[:size]) - {KEYS[alone]}
        cache.ask(KEYS[150])
        assert KEYS[alone] not in cache.held
        assert KEYS[150] in cache.held
        cache.leased = set(cache.held)
        cache.ask(KEYS[151])
        assert KEYS[151] not in cache.held


@pytest.mark.parametrize("num_idle", [0, 1, 5, 11, 50])
@pytest.mark.parametrize("eviction", Eviction)
def test_blocks_wait_for_the_writer_and_the_newest_may_leave(eviction: Eviction, num_idle: int) -> None:
    cache = Cache(eviction, 100)
    for key in KEYS[:100]:
        cache.ask(key)
    cache.leased = set(KEYS[: 100 - num_idle])
    for key in KEYS[100 : 100 + num_idle]:
        cache.ask(key)
        assert key in cache.held
        cache.leased.add(key)
    cache.ask(KEYS[199])
    assert KEYS[199] not in cache.held


def test_what_attention_uses_stays_and_the_newest_stay_without() -> None:
    cache = Cache(Eviction.PARTICIPATION, 8)
    for number, key in enumerate(KEYS[:8]):
        cache.ask(key)
        if number in (1, 3):
            cache.policy.attend(key, 0.5)
    for key in KEYS[8:14]:
        cache.ask(key)
        cache.policy.attend(KEYS[3], 0.1)
    # 1 and 3 were attended to; of the others the two newest are recent, and the rest left oldest first.
    assert {KEYS[1], KEYS[3], KEYS[12], KEYS[13]} <= cache.held
    assert not {KEYS[0], KEYS[2], KEYS[4], KEYS[5]} & cache.held


def test_old_attention_fades() -> None:
    cache = Cache(Eviction.PARTICIPATION, 4)
    for key in KEYS[:4]:
        cache.ask(key)
    cache.policy.attend(KEYS[0], 1.0)
    for _ in range(200):
        cache.policy.attend(KEYS[1], 0.1)
    cache.policy.attend(KEYS[2], 0.1)
    cache.ask(KEYS[4])
    assert KEYS[0] not in cache.held


def test_a_scan_costs_lru_everything_and_s3_fifo_little() -> None:
    kept = {}
    for eviction in (Eviction.LRU, Eviction.S3_FIFO):
        cache = Cache(eviction, 40)
        for _ in range(5):
            for key in KEYS[:30]:
                cache.ask(key)
        for key in KEYS[100:180]:
            cache.ask(key)
        kept[eviction] = sum(key in cache.held for key in KEYS[:30])
    assert kept == {Eviction.LRU: 0, Eviction.S3_FIFO: 30}
