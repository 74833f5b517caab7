# SPDX-License-Identifier: Apache-2.0
"""Seeded links whose bandwidth changes, and what questions over them meet: by fixed profile, or by plan."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.levels import Bandwidth, Option, plan

Choose = Callable[[Sequence[Sequence[Option]], float, float], Option]
"""(options of the blocks still to come, time, seconds left) -> option for the first of them."""

RAW_NBYTES = 8 << 20
NUM_BLOCKS = 24
DEADLINE_S = 1.0
DECODE_BYTES_PER_S = 6e9
LOSSES = {"lossless": (0.0, 0.67), "q8": (0.0002, 0.39), "q4": (0.0018, 0.24), "q3": (0.008, 0.16), "q2": (0.03, 0.13)}
"""Per profile: KL divergence and size as a fraction of the block as it is."""

QUESTION_EVERY_S = 2


@dataclass(frozen=True)
class Trace:
    """A link and a machine behind it.

    Args:
        rates: bytes per second, one for each second.
        prefill_s: seconds that computing a block again takes.
    """

    rates: list[float]
    prefill_s: float = 0.12

    def transfer(self, nbytes: int, begin_s: float, until_s: float) -> tuple[int, float]:
        """Bytes that arrive, and when the last of them does; nothing moves after `until_s`."""
        left, now_s = float(nbytes), begin_s
        while True:
            rate, end_s = self.rates[min(int(now_s), len(self.rates) - 1)], min(math.floor(now_s) + 1.0, until_s)
            if left <= rate * (end_s - now_s):
                return nbytes, now_s + left / rate
            left -= rate * (end_s - now_s)
            now_s = end_s
            if now_s >= until_s:
                return nbytes - math.ceil(left), until_s


@dataclass(frozen=True)
class Result:
    """Questions that were late, and the mean loss of the blocks of all questions."""

    misses: int
    loss: float


def traces(seed: int, duration_s: int = 240) -> dict[str, Trace]:
    """The links of one seed, most around 120 MB/s, which carries q8 in time and lossless not."""
    chance = random.Random(seed)
    walk, rate = [], 120e6
    for _ in range(duration_s):
        rate = min(max(rate * math.exp(chance.gauss(0.0, 0.25)), 15e6), 400e6)
        walk.append(rate)
    high = [120e6 * chance.uniform(0.9, 1.1) for _ in range(duration_s)]
    period = chance.uniform(17, 29)
    outages = [chance.randrange(10, duration_s - 10) for _ in range(5)]
    is_out = [any(0 <= second - begin < 8 for begin in outages) for second in range(duration_s)]
    return {
        "steady": Trace(high),
        "step down": Trace([rate if s < duration_s / 3 else rate / 3 for s, rate in enumerate(high)]),
        "sawtooth": Trace([20e6 + 180e6 * (s % period) / period for s in range(duration_s)]),
        "random walk": Trace(walk),
        # Where every block can be computed again in time, an outage need not be noticed.
        "outage": Trace([0.5e6 if out else 2 * rate for out, rate in zip(is_out, high, strict=True)], prefill_s=0.03),
    }


def options(prefill_s: float) -> list[Option]:
    """What every block can be had as."""
    stored = [
        Option(name, loss, int(RAW_NBYTES * size), RAW_NBYTES / DECODE_BYTES_PER_S)
        for name, (loss, size) in LOSSES.items()
    ]
    return [*stored, Option.recompute(prefill_s)]


def replay(trace: Trace, choose: Choose, note: Callable[[int, float, float], None]) -> Result:
    """Ask a question every few seconds as long as the trace lasts; one that is not done by then is given up.

    Args:
        trace: the link.
        choose: picks an option for the next block.
        note: told of every transfer: bytes, seconds, time of its end.
    """
    misses, losses = 0, []
    for begin_s in range(0, len(trace.rates), QUESTION_EVERY_S):
        now_s, until_s = float(begin_s), float(begin_s + QUESTION_EVERY_S)
        blocks = [options(trace.prefill_s)] * NUM_BLOCKS
        for first in range(NUM_BLOCKS):
            option = choose(blocks[first:], now_s, begin_s + DEADLINE_S - now_s)
            if option.nbytes:
                nbytes, end_s = trace.transfer(option.nbytes, now_s, until_s)
                note(nbytes, end_s - now_s, end_s)
                now_s = end_s
            now_s += option.work_s
            losses.append(option.loss)
            if now_s >= until_s:
                break
        misses += now_s > begin_s + DEADLINE_S
    return Result(misses, sum(losses) / len(losses))


def replay_fixed(trace: Trace, name: str) -> Result:
    """Always the same profile."""
    option = next(option for option in options(trace.prefill_s) if option.name == name)
    return replay(trace, lambda blocks, now_s, left_s: option, lambda nbytes, took_s, now_s: None)


def replay_planned(trace: Trace, prior: float = 200e6) -> Result:
    """The plan, from measured bandwidth."""
    bandwidth = Bandwidth(prior, memory_s=4.0)

    def choose(blocks: Sequence[Sequence[Option]], now_s: float, left_s: float) -> Option:
        return plan(blocks, bandwidth.expected(now_s), left_s)[0]

    return replay(trace, choose, bandwidth.note)
