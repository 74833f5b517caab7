# SPDX-License-Identifier: Apache-2.0
"""What a question found: cited time spans with scores, and what finding and loading them took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.session.residency import LoadReport
from kvstore.spec import BlockKey
from kvstore.store import Entry

MAX_SPANS = 8


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the stream's media that a question points at.

    Args:
        start_s: first second.
        end_s: last second.
        score: larger is better; comparable within one question only.
        is_attended: whether its blocks were given to the model.
        group: the frame group; -1 for text without frames.
        first_token: where its best block begins in the stream.
    """

    start_s: float
    end_s: float
    score: float
    is_attended: bool
    group: int
    first_token: int


@dataclass(slots=True)
class Speculation:
    """How well selections made for a later forward served it.

    Args:
        num_chosen: units that forwards would have chosen by themselves.
        num_had: those of them that had been chosen for them before.
    """

    num_chosen: int = 0
    num_had: int = 0

    @property
    def hit_rate(self) -> float:
        """Share that was there in time; 1 where nothing was asked for."""
        return self.num_had / self.num_chosen if self.num_chosen else 1.0


@dataclass(slots=True)
class Recall:
    """What one question found and attended to.

    Args:
        spans: best first; attended ones and the next best.
        num_attended_tokens: tokens of the past that the model attends to (the largest number over the layers).
        load: what bringing the blocks took.
        speculation: how well blocks that were chosen ahead served.
    """

    spans: list[Span] = field(default_factory=list)
    num_attended_tokens: int = 0
    load: LoadReport = field(default_factory=LoadReport)
    speculation: Speculation = field(default_factory=Speculation)


def cite(scores: Iterable[tuple[int, float]], entries: Sequence[Entry], attended: frozenset[int]) -> list[Span]:
    """Turn scored blocks into cited spans: one per frame group, with its best score.

    Args:
        scores: (block, score), best first.
        entries: the stream's entries.
        attended: blocks given to the model.
    """
    spans: dict[tuple[int, float, float], Span] = {}
    for block, score in scores:
        entry = entries[block]
        place = (entry.group, entry.start_s, entry.end_s)
        old = spans.get(place)
        if old is None:
            if len(spans) == MAX_SPANS:
                break
            spans[place] = Span(entry.start_s, entry.end_s, score, block in attended, entry.group, entry.first_token)
        elif block in attended and not old.is_attended:
            spans[place] = Span(old.start_s, old.end_s, old.score, True, old.group, old.first_token)
    return list(spans.values())


def losses(
    entries: Sequence[Entry], damaged: Mapping[int, str], lost: Mapping[BlockKey, str]
) -> list[tuple[Entry, str]]:
    """Blocks that a question had to do without, in order, with the reason.

    Args:
        entries: the stream's entries.
        damaged: blocks that could not be searched, by index.
        lost: blocks that could not be loaded, which then is the reason.
    """
    reasons = dict(damaged)
    if lost:  # else nobody looks at all names of a long stream
        reasons.update({entry.index: lost[entry.key] for entry in entries if entry.key in lost})
    return [(entries[index], reasons[index]) for index in sorted(reasons)]
