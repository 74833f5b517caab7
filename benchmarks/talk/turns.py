# SPDX-License-Identifier: Apache-2.0
"""What the user of a simulated chat says: passages of several texts in turns, notes, and questions for them."""

from __future__ import annotations

import argparse
import inspect
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

from machine import ROOT

Encode = Callable[[str], list[int]]

FEWEST_TOKENS, MOST_TOKENS = 500, 900
"""Of a passage."""
REFERENCE_PARTS = 5
TELL_EVERY = 4
ASK_AFTER = 8
"""Turns between a note and the question for it: about 6,000 tokens."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing that the user says.

    Args:
        ids: token ids, in the chat format, up to where the reply begins.
        text: which of them are a passage of natural text; empty where there is none.
        accept: wordings of which a right reply holds one; none where nothing is asked.
    """

    ids: list[int]
    text: slice
    accept: tuple[str, ...] = ()


def turns(encode: Encode, *, is_first: bool = True) -> Iterator[Turn]:
    """Passages of all texts, in turns, until one of them ends; notes among them, and questions for these."""
    facts = json.loads((ROOT / "examples" / "demo_facts.json").read_text(encoding="utf-8"))["planted"]
    asked: dict[int, dict[str, str]] = {}
    told = iter(facts)
    for number, passage in enumerate(passages(encode)):
        note = next(told, None) if number % TELL_EVERY == TELL_EVERY // 2 else None
        if note is not None:
            asked[number + ASK_AFTER] = note
        before = "" if note is None else f"{note['sentence']}\n\n"
        yield _turn(encode, before, passage, is_first=is_first and number == 0)
        if number in asked:
            fact = asked.pop(number)
            question = _turn(encode, fact["question"], [], is_first=False)
            yield Turn(question.ids, question.text, (fact["answer"], *fact.get("accept", ())))


def passages(encode: Encode) -> Iterator[list[int]]:
    """Token ids of a passage from each text in turn."""
    texts = [_cut(text, encode, random.Random(number)) for number, text in enumerate(_texts())]
    while True:
        for text in texts:
            passage = next(text, None)
            if passage is None:
                return
            yield passage


def _turn(encode: Encode, before: str, passage: list[int], *, is_first: bool) -> Turn:
    opening = encode(("" if is_first else "<|im_end|>\n") + f"<|im_start|>user\n{before}")
    ids = [*opening, *passage, *encode("<|im_end|>\n<|im_start|>assistant\n")]
    return Turn(ids, slice(len(opening), len(opening) + len(passage)))


def _texts() -> list[str]:
    """The language reference in equal parts, every paragraph once, and two programs."""
    longest_first = sorted(topics.values(), key=lambda text: (-len(text), text))
    paragraphs = list(dict.fromkeys(part for text in longest_first for part in text.split("\n\n") if part.strip()))
    whole = "\n\n".join(paragraphs)
    size = len(whole) // REFERENCE_PARTS
    parts = [whole[size * part : size * (part + 1)] for part in range(REFERENCE_PARTS)]
    return [*parts, inspect.getsource(argparse), inspect.getsource(inspect)]


def _cut(text: str, encode: Encode, chance: random.Random) -> Iterator[list[int]]:
    ids: list[int] = []
    wanted = chance.randint(FEWEST_TOKENS, MOST_TOKENS)
    for paragraph in text.split("\n\n"):
        ids += encode(f"{paragraph}\n\n")
        if len(ids) >= wanted:
            yield ids[:wanted]
            ids, wanted = ids[wanted:], chance.randint(FEWEST_TOKENS, MOST_TOKENS)
