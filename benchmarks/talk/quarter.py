# SPDX-License-Identifier: Apache-2.0
"""What a quarter of an hour of a chat was like: memory, disk, the user's words, the replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

QUARTER_S = 900.0
TOKENS_PER_S = 10.0
"""How fast people read and speak."""


@dataclass(slots=True)
class Quarter:
    """Sums of one quarter of an hour of simulated time.

    Args:
        times_s: simulated seconds after each turn.
        memory_mib: of the process then: all that is not a file's pages.
        disk_mib: of the store then.
        said: surprise at passages, in nats per token, one mean per turn, from sinks and window.
        halves: of some turns' second halves (from a fresh window, from sinks and window, with what came back).
        replies: in words.
        remembered: whether each reply to a question held its answer.
    """

    times_s: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    disk_mib: list[float] = field(default_factory=list)
    said: list[float] = field(default_factory=list)
    halves: list[tuple[float, float, float]] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    remembered: list[bool] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """Of the user's passages, from sinks and window."""
        return math.exp(mean(self.said))

    def half_perplexity(self, which: int) -> float:
        """Of second halves, by the place in `halves`."""
        return math.exp(mean(half[which] for half in self.halves))

    @property
    def printable(self) -> float:
        """Share of the replies' signs that can be printed."""
        signs = "".join(self.replies)
        return mean(sign.isprintable() or sign.isspace() for sign in signs) if signs else 0.0

    @property
    def distinct(self) -> float:
        """Share of words of a reply that are not a repetition, mean over replies."""
        words = [reply.split() for reply in self.replies]
        return mean(len(set(each)) / len(each) for each in words if each) if any(words) else 0.0


def memory_mib() -> float:
    """MiB of this process that are resident and no file's: what it would take from others."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


def slope(times_s: Sequence[float], values: Sequence[float]) -> float:
    """Growth per hour of simulated time, by least squares; 0 for fewer than two times."""
    if len(set(times_s)) < 2:
        return 0.0
    middle, level = mean(times_s), mean(values)
    moves = sum((time - middle) * (value - level) for time, value in zip(times_s, values, strict=True))
    return 3600 * moves / sum((time - middle) ** 2 for time in times_s)
