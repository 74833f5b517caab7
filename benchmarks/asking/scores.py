# SPDX-License-Identifier: Apache-2.0
"""What came of asking the same questions in one way, and the table of all ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from asking.truth import Question
from kvstore.video.ask import Answer

MIB = 1 << 20


@dataclass(slots=True)
class Scores:
    """Answers to questions, one policy's.

    Args:
        index_s: seconds until the policy could search the stream.
        asked: questions and their answers.
    """

    index_s: float
    asked: list[tuple[Question, Answer]] = field(default_factory=list)

    @property
    def known(self) -> float:
        """Share answered right of the questions whose answers stand in the video alone."""
        return self._share(is_known=True)

    @property
    def natural(self) -> float:
        """The same of the others."""
        return self._share(is_known=False)

    @property
    def right(self) -> float:
        """Share of all that were answered right."""
        return mean(question.is_right(answer.answer) for question, answer in self.asked)

    @property
    def moments(self) -> float:
        """Share of all whose moment was cited."""
        return mean(question.is_found(answer) for question, answer in self.asked)

    @property
    def first_token_s(self) -> list[float]:
        """Seconds to the first token of each answer."""
        return [answer.ttft_s for _, answer in self.asked]

    @property
    def attended(self) -> float:
        """Tokens of the stream that an answer attended to: median."""
        return median(answer.tokens_attended for _, answer in self.asked)

    @property
    def moved_nbytes(self) -> float:
        """Bytes brought to the device for an answer, from host and disk: median."""
        return median(answer.bytes_read["host"] + answer.bytes_read["disk"] for _, answer in self.asked)

    def _share(self, *, is_known: bool) -> float:
        """Right answers of one kind; 0 where none was asked."""
        found = [question.is_right(answer.answer) for question, answer in self.asked if question.is_known == is_known]
        return mean(found) if found else 0.0


def table(found: Mapping[tuple[str, bool], Scores]) -> str:
    """All ways side by side, by right answers."""
    rows: list[Sequence[str]] = [
        ["", "external", "known", "natural", "moments", "first token s", "tokens", "moved MiB", "index s"]
    ]
    for (name, is_external), one in sorted(found.items(), key=lambda item: (-item[1].right, -item[1].moments)):
        shares = [f"{share:.2f}" for share in (one.known, one.natural, one.moments)]
        moved = "" if is_external else f"{one.moved_nbytes / MIB:.1f}"  # asked again, some blocks are there already
        costs = [f"{median(one.first_token_s):.2f}", f"{one.attended:.0f}", moved]
        rows.append([name, "yes" if is_external else "no", *shares, *costs, f"{one.index_s:.1f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
