# SPDX-License-Identifier: Apache-2.0
"""Cuts passages of a given number of tokens out of what the recorder says stood on the screens."""

from __future__ import annotations

from collections.abc import Callable

from demo_scoring import Json

Encode = Callable[[str], list[int]]


def block_around(question: Json, screens: list[Json], encode: Encode, max_tokens: int) -> str:
    """The sentence that answers a question, with as much of its screen around it as a block holds.

    Args:
        question: with `kind`, `sentence` and `true_spans`.
        screens: what stood on the screen when.
        encode: the tokenizer.
        max_tokens: most tokens of the passage.
    """
    if question["kind"] == "spoken":
        return f"Spoken: {question['sentence']}"
    start_s = question["true_spans"][0][0]
    screen = next(screen for screen in screens if screen["start_s"] == start_s)
    text, sentence = (" ".join(words.split()) for words in (screen["text"], question["sentence"]))
    before, after = (part.split() for part in text.split(sentence, maxsplit=1))
    while len(encode(passage := " ".join([*before, sentence, *after]))) > max_tokens and (before or after):
        if len(before) >= len(after):
            before.pop(0)
        else:
            after.pop()
    return passage


def tokens_from(start_s: float, screens: list[Json], encode: Encode, num_tokens: int) -> list[int]:
    """The first `num_tokens` tokens of what stood on the screens from `start_s` on, or to the end of the video."""
    ids: list[int] = []
    for screen in screens:
        if screen["end_s"] > start_s and len(ids) < num_tokens:
            ids += encode(f"{screen['text']}\n")
    return ids[:num_tokens]
