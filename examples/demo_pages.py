# SPDX-License-Identifier: Apache-2.0
"""Lays CPython's language reference out as screens of text; knows nothing of time or video."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pydoc_data.topics import topics

from PIL import ImageFont

FONT = ImageFont.load_default(size=22)
TEXT_WIDTH = 1100
"""Pixels between the left and the right margin of the text."""
ROWS = 21
"""Text rows below the title; a blank row between paragraphs counts as half."""
INDENT_CHARS = 3

_ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "...", "°": " deg", "ß": "ss"})
_EMPHASIS = re.compile(r"\*{1,2}(\w[\w ,.:()'-]*)\*{1,2}")
_MIN_WRAPPED_CHARS = 50
_TOPIC_ROOM_ROWS = 6.0


@dataclass(frozen=True, slots=True)
class Line:
    """One row of text: what is drawn, how far it is indented, and whether it belongs to a highlighted note."""

    text: str
    indent: int = 0
    is_note: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """One screen: a title and paragraphs of lines."""

    title: str
    paragraphs: tuple[tuple[Line, ...], ...]

    @property
    def text(self) -> str:
        """All that is drawn, title first: rows joined by newlines, paragraphs by an empty line."""
        body = ("\n".join(line.text for line in lines) for lines in self.paragraphs)
        return "\n\n".join((self.title, *body))

    def says(self, sentence: str) -> bool:
        """Whether `sentence` stands on this screen, wherever its lines break."""
        return " ".join(sentence.split()) in " ".join(self.text.split())


@dataclass(frozen=True, slots=True)
class _Paragraph:
    topic: str
    lines: tuple[Line, ...]


def lay_out(notes: Mapping[int, str]) -> Iterator[Page]:
    """Yield the screens of the whole reference, in the reading order of its topics.

    Args:
        notes: screen number -> sentence to put, highlighted, amid the text of that screen.
    """
    paragraphs = _paragraphs()
    pending = next(paragraphs, None)
    for number in itertools.count():
        if pending is None:
            return
        note = wrap(notes[number], is_note=True) if number in notes else ()
        room = ROWS - (len(note) + 0.5 if note else 0.0)
        chosen: list[_Paragraph] = []
        while pending is not None:
            needed = len(pending.lines) + 0.5
            starts_topic = bool(chosen) and pending.topic != chosen[-1].topic
            if needed <= room and not (starts_topic and room < _TOPIC_ROOM_ROWS):
                chosen.append(pending)
                room -= needed
                pending = next(paragraphs, None)
                continue
            if not chosen or (needed > ROWS / 2 and room > ROWS / 2):
                # Longer than half a screen: split between rows, or most of the screen would stay empty.
                rows = int(room - 0.5)
                chosen.append(_Paragraph(pending.topic, pending.lines[:rows]))
                pending = _Paragraph(pending.topic, pending.lines[rows:])
            break
        yield _page(chosen, note)


def wrap(text: str, *, indent: int = 0, is_note: bool = False) -> tuple[Line, ...]:
    """Break `text` between words into lines no wider than the screen's text area."""
    width = TEXT_WIDTH - indent * _word_width(" ")
    lines: list[Line] = []
    words: list[str] = []
    used = 0.0
    for word in text.split(" "):
        more = _word_width(word) + (_word_width(" ") if words else 0.0)
        if words and used + more > width:
            lines.append(Line(" ".join(words), indent, is_note))
            words, used, more = [], 0.0, _word_width(word)
        words.append(word)
        used += more
    return (*lines, Line(" ".join(words), indent, is_note))


def _page(chosen: list[_Paragraph], note: tuple[Line, ...]) -> Page:
    names = list(dict.fromkeys(paragraph.topic for paragraph in chosen))
    bodies = [paragraph.lines for paragraph in chosen]
    if note:
        bodies.insert(len(bodies) // 2, note)
    return Page("Python language reference: " + ", ".join(names), tuple(bodies))


def _paragraphs() -> Iterator[_Paragraph]:
    """Every paragraph once: many topics are excerpts of longer ones, and a reader does not read them twice."""
    longest_first = sorted(topics, key=lambda name: (-len(topics[name]), name))
    owner = {block: name for name in reversed(longest_first) for block in _blocks(topics[name])}
    for name in sorted(topics):
        for block in _blocks(topics[name]):
            if owner.pop(block, None) == name:
                yield _Paragraph(name, _lines(block.split("\n")))
            # A paragraph that a longer topic also holds stays with that one, where its neighbours are.


def _blocks(topic: str) -> list[str]:
    return [block for block in topic.translate(_ASCII).split("\n\n") if block.strip(" \n*=-~^")]


def _table_rows(rows: list[str]) -> Iterator[str]:
    """Read a drawn table as one text per row, its cells set apart by colons: a screen reader cannot read rules."""
    cells: list[str] = []
    for row in rows:
        if row.startswith(("+-", "|=", "+=")):
            if cells:
                yield _joined(cells)
            cells = []
            continue
        parts = row.strip("|").split(" | ")
        cells = [f"{cell} {part}" for cell, part in zip_longest(cells, parts, fillvalue="")]
    if cells:
        yield _joined(cells)


def _joined(cells: list[str]) -> str:
    return ": ".join(" ".join(cell.split()) for cell in cells).rstrip(": ")


def _lines(rows: list[str]) -> tuple[Line, ...]:
    rows = [row for row in rows if row.strip(" *=-~^")]
    indent = min(len(row) - len(row.lstrip()) for row in rows)
    rows = [row[indent:].rstrip() for row in rows]
    indent = min(indent, 4 * INDENT_CHARS)
    if rows[0].startswith("+-"):
        return tuple(line for row in _table_rows(rows) for line in wrap(row, indent=indent))
    wraps = all(len(row) + indent >= _MIN_WRAPPED_CHARS for row in rows[:-1])
    if wraps and not any(sign in row for row in rows for sign in (">>>", "::=")):
        prose = _EMPHASIS.sub(r"\1", " ".join(" ".join(rows).split()))
        return wrap(re.sub(r"^\* ", "- ", prose), indent=indent)
    code: list[Line] = []
    for row in rows:
        code += wrap(row.lstrip(), indent=indent + len(row) - len(row.lstrip()))
    return tuple(code)


@cache
def _word_width(word: str) -> float:
    return float(FONT.getlength(word))
