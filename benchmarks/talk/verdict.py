# SPDX-License-Identifier: Apache-2.0
"""What must hold of a chat that does not end: constant memory, replies that are text, a model that still listens."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from talk.quarter import Quarter

SETTLED = 2
"""Quarters until caches are full: growth is measured behind them."""
MOST_GROWTH = 1.05
"""Of the median memory, from the last quarter that settles until the end of the chat."""
MOST_SURPRISE = 1.1
"""Perplexity from sinks and window over that from the same tokens read anew, in any quarter."""
LEAST_PRINTABLE = 0.99
LEAST_DISTINCT = 0.5
"""Share of a reply's words that are not a repetition: a model that has lost its sinks says one word again and again."""


def faults(quarters: Sequence[Quarter]) -> list[str]:
    """What does not hold of a chat, quarter by quarter; memory is judged where one lies behind those that settle."""
    found = []
    settled = median(quarters[min(SETTLED, len(quarters)) - 1].memory_mib)
    for number, quarter in enumerate(quarters, 1):
        memory = median(quarter.memory_mib)
        if number > SETTLED and memory > MOST_GROWTH * settled:
            found.append(f"quarter {number}: {memory:.0f} MiB of memory, after {settled:.0f} in quarter {SETTLED}")
        if quarter.printable < LEAST_PRINTABLE:
            found.append(f"quarter {number}: {quarter.printable:.1%} of what is replied can be printed")
        if quarter.distinct < LEAST_DISTINCT:
            found.append(f"quarter {number}: {quarter.distinct:.1%} of a reply's words are no repetition")
        if quarter.halves:
            fresh, window = quarter.half_perplexity(0), quarter.half_perplexity(1)
            if window > MOST_SURPRISE * fresh:
                found.append(f"quarter {number}: a perplexity of {window:.2f}, and of {fresh:.2f} from a fresh window")
    return found
