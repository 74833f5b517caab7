# SPDX-License-Identifier: Apache-2.0
"""The demo's recording: its store, what stood on its screens when, and questions whose answers are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.video.ask import Answer
from machine import ROOT

sys.path.append(str(ROOT / "examples"))
from demo_passages import Encode, block_around
from demo_scoring import KNOWN_KINDS, Json, is_hit, is_moment_found, wordings

STREAM = "reading"


@dataclass(frozen=True, slots=True)
class Line:
    """Something that was shown or said: seconds from and to, and its text."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Args:
        text: in words.
        is_known: whether its answer stands in the video alone; other answers paraphrase what a manual says.
        truth: as the recorder wrote it, in the form in which the demo scores it.
    """

    text: str
    is_known: bool
    truth: Json

    def is_right(self, answer: str) -> bool:
        """Whether an answer says what was expected."""
        return is_hit(answer, wordings(self.truth))

    def is_found(self, answer: Answer) -> bool:
        """Whether the right moment was cited: first, or for questions about a manual's text among three."""
        return is_moment_found(self.truth | {"retrieval": answer.to_json()})


@dataclass(frozen=True, slots=True)
class Recording:
    """What `make demo` left in a folder.

    Args:
        store: the folder of its store.
        questions: in the order of their answers in the video, by kind.
        lines: a transcript: paragraphs of screens, and sentences that were spoken.
        screens: what stood on the screens when, as the recorder wrote it.
    """

    store: Path
    questions: list[Question]
    lines: list[Line]
    screens: list[Json]

    @staticmethod
    def of(folder: Path) -> Recording:
        """Read it; ends the program where there is none."""
        store, path = folder / "store", folder / "reading.json"
        if not (store.is_dir() and path.is_file()):
            sys.exit(f"{folder} holds no demo: run `make demo` first, or name its folder with --folder")
        truth: Json = json.loads(path.read_text(encoding="utf-8"))
        lines = [
            Line(screen["start_s"], screen["end_s"], paragraph)
            for screen in truth["screens"]
            for paragraph in screen["text"].split("\n\n")
        ]
        for fact in truth["facts"]:
            if fact["kind"] == "spoken":
                lines += [Line(start_s, end_s, fact["sentence"]) for start_s, end_s in fact["spans"]]
        questions = [_question(fact) for fact in (*truth["facts"], *truth["natural"])]
        return Recording(store, questions, lines, truth["screens"])

    def passage(self, question: Question, encode: Encode, max_tokens: int) -> str:
        """The text that answers a question, with what stands around it."""
        return block_around(question.truth, self.screens, encode, max_tokens)


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` of the questions, evenly."""
    return [questions[len(questions) * number // count] for number in range(min(count, len(questions)))]


def _question(fact: Json) -> Question:
    kept = {key: fact[key] for key in ("kind", "question", "accept", "sentence")}
    truth = kept | {"expected": fact["answer"], "true_spans": fact["spans"]}
    return Question(fact["question"], fact["kind"] in KNOWN_KINDS, truth)
