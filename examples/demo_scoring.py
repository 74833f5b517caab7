# SPDX-License-Identifier: Apache-2.0
"""Scores answers and cited time spans against the truth that the recorder wrote, and sums the scores up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import mean, median
from typing import Any

Json = dict[str, Any]

ROWS = {
    "retrieval": "retrieved from disk",
    "streaming_llm": "recent text only (streaming_llm)",
    "no_context": "nothing but the question",
    "oracle": "the true passage, as plain text",
}
"""What the model may read, row by row; each question is answered once per row."""

KNOWN_KINDS = ("planted", "spoken")
"""Questions whose answers stand nowhere but in the video."""

GOAL = 0.8
"""Share of right answers, and of right time spans, below which the demo says that it missed its goal."""


def is_hit(answer: str, wanted: Iterable[str]) -> bool:
    """Say whether one of the wanted wordings stands in the answer as whole words, in any case."""
    text = _folded(answer)
    return any(re.search(rf"(?<!\w){re.escape(_folded(wording))}(?!\w)", text) for wording in wanted)


def is_right_moment(span: Sequence[float], truths: Iterable[Sequence[float]]) -> bool:
    """Say whether a cited span and a true one are the same moment: the middle of the shorter lies in the longer.

    Spans that only touch, as neighbouring screens do, are not the same moment.

    Args:
        span: first and last second.
        truths: the same of every true moment.
    """
    for truth in truths:
        shorter, longer = sorted((span, truth), key=lambda one: one[1] - one[0])
        if longer[0] < (shorter[0] + shorter[1]) / 2 < longer[1]:
            return True
    return False


def is_moment_found(question: Json) -> bool:
    """Say whether the stream was searched well: the first cited span, or for natural questions one of three."""
    spans = question["retrieval"]["spans"][: 3 if question["kind"] == "natural" else 1]
    return any(is_right_moment((span["start_s"], span["end_s"]), question["true_spans"]) for span in spans)


def wordings(question: Json) -> list[str]:
    """The expected answer and its accepted variants."""
    return [question["expected"], *question["accept"]]


def mark_cold(questions: list[Json]) -> None:
    """Note per question whether all that it retrieved came from disk.

    The preamble is in memory for all of them, so the least that any question found there is the preamble.
    """
    read = [question["retrieval"]["bytes_read"] for question in questions]
    preamble = min((nbytes["device"] for nbytes in read), default=0)
    for question, nbytes in zip(questions, read, strict=True):
        question["is_cold"] = nbytes["disk"] > 0 and nbytes["host"] == 0 and nbytes["device"] == preamble


def summarise(questions: list[Json], num_stream_tokens: int) -> Json:
    """Sum up what every row scored and what the first tokens took; rates are None where nothing was asked.

    Args:
        questions: scored questions, with `is_cold`.
        num_stream_tokens: tokens of the whole stream.
    """
    known = [question for question in questions if question["kind"] in KNOWN_KINDS]
    natural = [question for question in questions if question["kind"] == "natural"]
    cold = [question for question in questions if question["is_cold"]]
    rate = _median(q["prefill"]["num_tokens"] / q["prefill"]["ttft_s"] for q in questions)
    return {
        "num_known": len(known),
        "num_natural": len(natural),
        "accuracy": {row: _rate(q[row]["is_hit"] for q in known) for row in ROWS},
        "natural_accuracy": {row: _rate(q[row]["is_hit"] for q in natural) for row in ROWS},
        "first_span_right": _rate(q["is_moment_found"] for q in known),
        "natural_in_three": _rate(q["is_moment_found"] for q in natural),
        "num_cold": len(cold),
        "disk_ttft_s": _median(q["retrieval"]["ttft_s"] for q in cold),
        "any_tier_ttft_s": _median(q["retrieval"]["ttft_s"] for q in questions),
        "disk_nbytes": _median(q["retrieval"]["bytes_read"]["disk"] for q in cold),
        "device_nbytes": _median(q["device_nbytes"] for q in cold if q["device_nbytes"] is not None),
        "prefill_ttft_s": _median(q["prefill"]["ttft_s"] for q in cold),
        "prefill_tokens": _median(q["prefill"]["num_tokens"] for q in cold),
        "prefill_tokens_per_s": rate,
        "whole_prefill_s": num_stream_tokens / rate if rate else None,
    }


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _rate(flags: Iterable[bool]) -> float | None:
    values = list(flags)
    return mean(values) if values else None


def _median(numbers: Iterable[float]) -> float | None:
    values = list(numbers)
    return median(values) if values else None
