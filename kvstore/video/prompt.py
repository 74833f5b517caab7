# SPDX-License-Identifier: Apache-2.0
"""The words around video text and questions, and how text is cut into blocks of whole sentences."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

PREAMBLE = """Reminder: the colour of the garden gate is white. The list is sorted in place.
Question: What is the colour of the garden gate?
Answer: The colour of the garden gate is white.

A module is a file. Note: Anna left her umbrella in the blue taxi.
Question: Where did Anna leave her umbrella?
Answer: Anna left her umbrella in the blue taxi.

Note: the door number of the archive is 4410. The statement binds names.
Question: What is the door number of the archive?
Answer: The door number of the archive is 4410.

"""
"""First tokens of every stream, attended by every question: shows a model without instruction tuning what to do."""

PICTURE_PREAMBLE = "These are pictures of a video, each behind its time, with what is said in it.\n"
"""The same for a model that is fed pictures."""

_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+(?=\S)|\n+")


@dataclass(frozen=True, slots=True)
class Prompts:
    """The words around a stream and a question.

    Args:
        preamble: first tokens of the stream, attended by every question.
        before: what stands between the passages and the question.
        after: what follows the question; the model continues it.
    """

    preamble: str
    before: str = "\nQuestion: "
    after: str = "\nAnswer:"

    def question(self, question: str) -> str:
        """The text that follows the retrieved passages."""
        return f"{self.before}{question.strip()}{self.after}"


TEXT_PROMPTS = Prompts(PREAMBLE)


def question_prompt(question: str) -> str:
    """The text that follows passages of text."""
    return TEXT_PROMPTS.question(question)


def words_of(start_s: float, text: str) -> str:
    """What a model reads of one observation."""
    return f"\n[{stamp(start_s)}] {text}\n"


def stamp(seconds: float) -> str:
    """A time as people write it: `1:02:03`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def cut_into_blocks(text: str, encode: Callable[[str], list[int]], block_tokens: int) -> list[list[int]]:
    """Tokenise a text and cut it into blocks that end where sentences end.

    Args:
        text: one observation.
        encode: the tokenizer.
        block_tokens: most tokens of a block; a longer sentence is cut inside.

    Returns:
        Token ids, block by block; joined they are the whole text.
    """
    blocks: list[list[int]] = []
    current: list[int] = []
    for sentence in _sentences(text):
        ids = encode(sentence)
        if len(current) + len(ids) > block_tokens and current:
            blocks.append(current)
            current = []
        while len(ids) > block_tokens:
            blocks.append(ids[:block_tokens])
            ids = ids[block_tokens:]
        current = current + ids
    if current:
        blocks.append(current)
    return blocks


def _sentences(text: str) -> list[str]:
    """Cut before the blank that follows a sentence, so that the pieces join to the text."""
    pieces, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        if match.start() > start:
            pieces.append(text[start : match.start()])
            start = match.start()
    pieces.append(text[start:])
    return [piece for piece in pieces if piece]
