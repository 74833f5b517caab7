# SPDX-License-Identifier: Apache-2.0
"""Hit rates of eviction policies on made-up traces, and what a decision costs; no device is touched."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from harness import Report, options
from kvstore.config import Eviction
from kvstore.spec import BlockKey, chain_key
from kvstore.tiers.eviction.partitions import make_policy

CAPACITY = 1000
KEYS = [chain_key(None, number.to_bytes(4, "little"), "bench") for number in range(20 * CAPACITY)]


Ask = tuple[int, float]
"""A block, and how much attention it gets."""


def zipf(rng: random.Random, length: int) -> Iterator[Ask]:
    """Few blocks are asked for most of the time."""
    weights = [1 / (rank + 1) ** 0.9 for rank in range(len(KEYS))]
    yield from ((number, 1.0) for number in rng.choices(range(len(KEYS)), weights, k=length))


def scans(rng: random.Random, length: int) -> Iterator[Ask]:
    """A working set of half the tier, and every now and then somebody reads 3,000 blocks once."""
    left = length
    while left > 0:
        yield from ((rng.randrange(CAPACITY // 2), 1.0) for _ in range(4000))
        first = rng.randrange(CAPACITY, len(KEYS) - 3000)
        yield from ((number, 0.0) for number in range(first, first + 3000))
        left -= 7000


def loop(rng: random.Random, length: int) -> Iterator[Ask]:
    """The same blocks in turns, a fifth more than fit."""
    yield from ((step % (CAPACITY * 6 // 5), 1.0) for step in range(length))


def questions(rng: random.Random, length: int) -> Iterator[Ask]:
    """Questions about a stream: sinks, the latest blocks, favourites that are attended to, others that are not."""
    favourites = rng.sample(range(len(KEYS)), 2 * CAPACITY)
    for step in range(length // 64):
        newest = 2000 + step % (len(KEYS) - 2000)
        yield from ((number, 1.0) for number in range(4))
        yield from ((number, 0.05) for number in range(newest - 12, newest))
        weights = [1 / (rank + 1) for rank in range(len(favourites))]
        yield from ((number, 0.5) for number in rng.choices(favourites, weights, k=32))
        yield from ((rng.randrange(newest), 0.01) for _ in range(16))


TRACES = {"zipf": zipf, "scans": scans, "loop": loop, "questions": questions}


def hit_rate(eviction: Eviction, trace: list[Ask]) -> tuple[float, float]:
    """Play a trace; returns the share of hits and microseconds per ask."""
    policy = make_policy(eviction, CAPACITY)
    held: set[BlockKey] = set()
    num_hits = 0
    began_s = time.perf_counter()
    for number, mass in trace:
        key = KEYS[number]
        if key in held:
            num_hits += 1
            policy.use(key)
        else:
            if len(held) == CAPACITY:
                victim = policy.victim(lambda _: True)
                assert victim is not None, "nothing is leased"
                held.remove(victim)
            policy.add(key)
            held.add(key)
        policy.attend(key, mass)
    return num_hits / len(trace), (time.perf_counter() - began_s) / len(trace) * 1e6


def main() -> None:
    """Compare all policies with LRU."""
    settings = options("hit-rates", __doc__)
    report = Report(settings, {"capacity": CAPACITY, "blocks": len(KEYS)})
    length = 60_000 if settings.quick else 400_000
    for name, make in TRACES.items():
        trace = list(make(random.Random(1), length))
        rate, cost = hit_rate(Eviction.LRU, trace)
        for eviction in Eviction:
            found, found_cost = (rate, cost) if eviction is Eviction.LRU else hit_rate(eviction, trace)
            # A loop larger than the tier never hits under LRU: a ratio needs more than nothing.
            baseline = max(rate, 1 / len(trace))
            report.value("hit rate", "share", (eviction, max(found, 1 / len(trace))), ("lru", baseline), trace=name)
            report.value("cost of an ask", "us", (eviction, found_cost), ("lru", cost), trace=name)
    report.write()


if __name__ == "__main__":
    main()
