# SPDX-License-Identifier: Apache-2.0
"""What is read: natural texts, and prompts with notes planted in them that are asked for at the end."""

from __future__ import annotations

import inspect
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from pydoc_data.topics import topics

from recall.capture import SINK_TOKENS, WINDOW_TOKENS

Encode = Callable[[str], list[int]]

_FACTS = Path(__file__).resolve().parents[2] / "examples" / "demo_facts.json"
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True, slots=True)
class Ask:
    """A planted note, and the tokens behind the past that ask for it and say it again.

    Args:
        note: numbers of the note's tokens, in the middle of the past.
        asks: which of the tokens behind the past ask, counted from the past's end.
        answer: which of them are the answer, likewise; a model that remembers predicts them one by one.
    """

    note: slice
    asks: slice
    answer: slice


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to read.

    Args:
        ids: token ids.
        num_queries: the last ones of them look back at the others.
        asks: planted notes; none in a plain text.
        next_id: the token behind the text: the last one of an answer need not be read to be predicted.
    """

    ids: list[int]
    num_queries: int
    asks: tuple[Ask, ...] = ()
    next_id: int = -1


def natural_texts(encode: Encode, num_past: int, num_queries: int, given: Path | None) -> dict[str, Prompt]:
    """Prose of packages, a manual and a program, of `num_past + num_queries` tokens each; or the given file alone."""
    if given is not None:
        texts = {given.name: given.read_text(encoding="utf-8")}
    else:
        texts = {
            "prose": "".join(metadata(name)["Description"] for name in ("torch", "transformers", "numpy")),
            "reference": topics["typesseq"],
            "source": inspect.getsource(random),
        }
    found = {name: encode(text)[: num_past + num_queries] for name, text in texts.items()}
    for name, ids in found.items():
        if len(ids) < num_past + num_queries:
            sys.exit(f"{name}: the text has {len(ids)} tokens, {num_past + num_queries} wanted")
    return {name: Prompt(ids, num_queries) for name, ids in found.items()}


def passkey(encode: Encode, num_tokens: int, depth: float, seed: int) -> Prompt:
    """Five digits in a repeated filler, asked for in a raw prompt.

    Source: the passkey task of Mohtashami and Jaggi (arXiv:2305.16300), as InfLLM asks it.

    Args:
        encode: the tokenizer.
        num_tokens: about as long.
        depth: where the note stands, 0 to 1.
        seed: of the digits.
    """
    key = random.Random(seed).randint(10_000, 99_999)
    task, filler, question = encode(_TASK), encode(_FILLER), encode(_QUESTION)
    note, answer = encode(f"The pass key is {key}. Remember it. {key} is the pass key.\n"), encode(f" {key}")
    count = (num_tokens - len(task) - len(note) - len(question) - len(answer)) // len(filler)
    # The window would show a note behind the middle to everybody.
    last = count - -(-(WINDOW_TOKENS + len(note)) // len(filler))
    before = max(min(int(count * depth), last), 1)
    ids = task + filler * before
    found = slice(len(ids), len(ids) + len(note))
    ids += note + filler * (count - before) + question + answer
    asks = slice(0, len(question) + len(answer) - 1)
    ask = Ask(found, asks, slice(len(question), len(question) + len(answer)))
    return Prompt(ids[:-1], asks.stop, (ask,), ids[-1])


def notes_in(encode: Encode, text: Sequence[int], num_past: int, num_notes: int) -> Prompt:
    """Plant notes evenly over a text, and say each again at its end, up to the answer and with it.

    Args:
        encode: the tokenizer.
        text: token ids, at least `num_past`.
        num_past: tokens before the first note is said again.
        num_notes: how many.
    """
    facts = json.loads(_FACTS.read_text(encoding="utf-8"))["planted"][:num_notes]
    notes = [encode(f"\n\n{fact['sentence']}\n\n") for fact in facts]
    rest = num_past - sum(len(note) for note in notes)
    first, end = SINK_TOKENS, rest - WINDOW_TOKENS
    ids: list[int] = []
    behind: list[int] = []
    asks = []
    taken = 0
    for number, (fact, note) in enumerate(zip(facts, notes, strict=True)):
        place = first + int((end - first) * (number + 0.5) / num_notes)
        ids += text[taken:place]
        taken = place
        cue = encode(f"\n\n{fact['sentence'][: fact['sentence'].rindex(fact['answer'])].rstrip()}")
        said = encode(f"\n\n{fact['sentence']}")
        answer = slice(len(behind) + len(cue), len(behind) + len(said) - 1)  # without the full stop
        asks.append(Ask(slice(len(ids), len(ids) + len(note)), slice(len(behind), answer.start), answer))
        ids += note
        behind += said
    ids += text[taken:rest]
    return Prompt(ids + behind, len(behind), tuple(asks))
