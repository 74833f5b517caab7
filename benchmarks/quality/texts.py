# SPDX-License-Identifier: Apache-2.0
"""The texts that are read: four kinds that come with Python and this project's packages, with notes planted in them."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parents[2]
PROMPT_TOKENS = 2048
CONTINUATION_TOKENS = 512
NEEDLES = 5
"""Notes planted in each prompt."""

_LICENCES = ("numpy", "pillow", "transformers")
_SCREENS = 24
_BLANKS = re.compile(r"[ \t]+")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Needle:
    """A planted fact, said again: a model that remembers it says the answer by itself.

    Args:
        ids: token ids of the note.
        answer: which of them are the answer.
    """

    ids: list[int]
    answer: slice


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Args:
        name: its kind.
        ids: PROMPT_TOKENS tokens to read, CONTINUATION_TOKENS to predict from, and one more.
        needles: what is planted in the prompt.
    """

    name: str
    ids: list[int]
    needles: list[Needle]


def documents(encode: Encode) -> list[Document]:
    """All documents, always the same for one tokenizer, one Python and one set of packages."""
    facts = json.loads((ROOT / "examples" / "demo_facts.json").read_text(encoding="utf-8"))["planted"]
    texts = {"screens": _screens(), "reference": _reference(), "source": _source(), "licences": _licences()}
    return [
        planted(name, text, facts[NEEDLES * place : NEEDLES * (place + 1)], encode)
        for place, (name, text) in enumerate(texts.items())
    ]


def planted(name: str, text: str, facts: list[dict[str, str]], encode: Encode) -> Document:
    """Put facts between the paragraphs of a text, evenly over the prompt.

    Args:
        name: of the document.
        text: at least as long as a document.
        facts: `sentence`s and the `answer`s that end them, NEEDLES of them.
        encode: the tokenizer.
    """
    paragraphs = [encode(f"{part}\n\n") for part in _BLANKS.sub(" ", text).split("\n\n")]
    places = [int(PROMPT_TOKENS * (number + 0.5) / NEEDLES) for number in range(NEEDLES)]
    ids: list[int] = []
    needles = []
    pending = list(zip(places, facts, strict=True))
    for paragraph in paragraphs:
        while pending and len(ids) + len(paragraph) > pending[0][0]:
            sentence, answer = pending[0][1]["sentence"], pending[0][1]["answer"]
            note, first = encode(f"{sentence}\n\n"), len(encode(sentence[: sentence.rindex(answer)].rstrip()))
            needles.append(Needle(note, slice(first, len(encode(sentence)) - 1)))
            ids += note
            del pending[0]
        ids += paragraph
    wanted = PROMPT_TOKENS + CONTINUATION_TOKENS + 1
    if len(ids) < wanted:
        sys.exit(f"{name}: the text has {len(ids)} tokens, {wanted} wanted")
    return Document(name, ids[:wanted], needles)


def _screens() -> str:
    """What the demo's recorder shows on its screens, without the video between."""
    sys.path.append(str(ROOT / "examples"))
    from demo_pages import lay_out

    pages = lay_out({})
    return "\n\n".join(next(pages).text for _ in range(_SCREENS))


def _reference() -> str:
    return topics["typesseq"]


def _source() -> str:
    return inspect.getsource(argparse)


def _licences() -> str:
    """Licence texts that packages carry: prose of another kind."""
    return "\n\n".join(
        file.read_text(encoding="utf-8")
        for package in _LICENCES
        for file in sorted(files(package) or [], key=str)
        if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))
    )
