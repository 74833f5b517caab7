# SPDX-License-Identifier: Apache-2.0
"""Reads the text on a screen with Tesseract. The only importer of `tesserocr`."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kvstore.errors import MissingDependencyError
from kvstore.extras import missing_dependency
from kvstore.video.changes import FrameGroup
from kvstore.video.perception import Observation

_DARK_LEVEL = 110
_SMALL_HEIGHT = 600
_MIN_CONFIDENCE = 50.0
"""Percent. Of lines found in camera footage 98 in 100 lie below, of lines of rendered prose and code 2 in 100."""
_MIN_WORD_SHARE = 0.3
_PARAGRAPH_GAP = 0.75
_INDENT_STEP = 1.0
_FULL_LINE = 0.75
_PLAIN_QUOTES = str.maketrans("‘’“”", "''\"\"")
"""Tesseract guesses at the slant of quotes; a language model reads plain ones better than wrong ones."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One line as found on the screen; edges in pixels."""

    text: str
    left: int
    top: int
    right: int
    bottom: int


class ScreenReader:
    """Reads screens, one at a time, with one thread.

    Args:
        language: Tesseract's name of the language, e.g. `eng` or `eng+deu`.
        data: folder with `<language>.traineddata`; None looks where the `tessdata.fast-*` packages put it.

    Attributes:
        name: what decides the text: Tesseract's version, the language and a digest of its data.

    Raises:
        MissingDependencyError: tesserocr or the language's data is not installed.
    """

    def __init__(self, language: str = "eng", data: Path | None = None) -> None:
        folder = data if data is not None else Path(sys.prefix) / "share" / "tessdata"
        trained = [folder / f"{name}.traineddata" for name in language.split("+")]
        for name, path in zip(language.split("+"), trained, strict=True):
            if not path.is_file():
                raise MissingDependencyError(f"no {name}.traineddata in {folder}: pip install tessdata.fast-{name}")
        # OpenMP reads its limit once, when Tesseract is loaded; more threads make pages of this size slower.
        limit = os.environ.get("OMP_THREAD_LIMIT")
        os.environ.setdefault("OMP_THREAD_LIMIT", "1")
        try:
            import tesserocr
        except ImportError as error:
            raise missing_dependency("tesserocr", "reading screens") from error
        finally:
            if limit is None:
                del os.environ["OMP_THREAD_LIMIT"]
        self._tesserocr = tesserocr
        digest = hashlib.blake2b(b"".join(path.read_bytes() for path in trained), digest_size=8).hexdigest()
        self.name = f"{tesserocr.tesseract_version().split(chr(10))[0]}, {language} {digest}"
        self._api = tesserocr.PyTessBaseAPI(
            path=str(folder), lang=language, psm=tesserocr.PSM.SINGLE_BLOCK, oem=tesserocr.OEM.LSTM_ONLY
        )

    def describe(self, group: FrameGroup) -> Observation:
        """Read the group's frame; the text is empty when there is none on it."""
        return Observation(group.start_s, group.end_s, self.read(group.frame.rgb()))

    def read(self, pixels: NDArray[np.uint8]) -> str:
        """Return the paragraphs on a picture, lines joined where they only wrap.

        Args:
            pixels: [height, width, 3] uint8, RGB; light text on dark is turned around first.
        """
        image = Image.fromarray(pixels).convert("L")
        if np.asarray(image).mean() < _DARK_LEVEL:
            image = image.point(lambda level: 255 - level)
        if image.height < _SMALL_HEIGHT:
            image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
        self._api.SetImage(image)
        self._api.Recognize()
        return _paragraphs([line for line in self._lines() if _is_text(line.text)])

    def close(self) -> None:
        """Free Tesseract's memory."""
        self._api.End()

    def _lines(self) -> list[_Line]:
        lines: list[_Line] = []
        level = self._tesserocr.RIL.TEXTLINE
        found = self._api.GetIterator()
        if found is None:
            return lines
        for item in self._tesserocr.iterate_level(found, level):
            # A line without characters has no text to ask for, and asking raises RuntimeError.
            if item.Empty(level) or item.Confidence(level) < _MIN_CONFIDENCE:
                continue
            box = item.BoundingBox(level)
            lines.append(_Line(" ".join(item.GetUTF8Text(level).translate(_PLAIN_QUOTES).split()), *box))
        return lines


def _is_text(line: str) -> bool:
    """Whether a line holds words, and not only the debris of pictures and rules."""
    num_word = sum(char.isalnum() for char in line)
    return num_word >= 2 and num_word >= _MIN_WORD_SHARE * len(line.replace(" ", ""))


def _paragraphs(lines: list[_Line]) -> str:
    """Join lines that wrap; keep apart those that were short, indented otherwise, or set off by white space."""
    if not lines:
        return ""
    height = float(np.median([line.bottom - line.top for line in lines]))
    full = _FULL_LINE * max(line.right for line in lines)
    text = lines[0].text
    for above, line in itertools.pairwise(lines):
        if line.top - above.bottom > _PARAGRAPH_GAP * height:
            text += "\n\n"
        elif above.right < full or abs(line.left - above.left) > _INDENT_STEP * height:
            text += "\n"
        else:
            text += " "
        text += line.text
    return text
