# SPDX-License-Identifier: Apache-2.0
"""kvstore/video/ocr.py: reads light and dark screens, keeps paragraphs, leaves debris out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

for _module in ("av", "PIL", "tesserocr"):
    pytest.importorskip(_module)

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from kvstore.errors import MissingDependencyError  # noqa: E402
from kvstore.video.ocr import ScreenReader  # noqa: E402


@pytest.fixture(scope="module")
def reader() -> ScreenReader:
    return ScreenReader()


def _screen(*lines: tuple[int, str], size: tuple[int, int] = (1280, 720), dark: bool = False) -> NDArray[np.uint8]:
    """A screen with each line of text at its height."""
    paper, ink = ((20, 20, 30), (230, 230, 230)) if dark else ((250, 250, 250), (20, 20, 20))
    image = Image.new("RGB", size, paper)
    pen = ImageDraw.Draw(image)
    for y, line in lines:
        pen.text(
            (40, y), line, font=ImageFont.load_default(size=22 * size[1] // 720 if size[1] < 720 else 22), fill=ink
        )
    return np.asarray(image)


def test_dark_screens_read_as_well_as_light_ones(reader: ScreenReader) -> None:
    lines = ((100, "The quick brown fox jumps over the lazy dog."), (140, "Pack my box with five dozen jugs."))
    assert reader.read(_screen(*lines, dark=True)) == reader.read(_screen(*lines))
    assert "quick brown fox" in reader.read(_screen(*lines))


def test_small_videos_are_read_enlarged(reader: ScreenReader) -> None:
    assert "quick brown fox" in reader.read(_screen((50, "The quick brown fox jumps."), size=(640, 480)))


def test_a_wrapped_paragraph_is_joined_and_paragraphs_are_kept_apart(reader: ScreenReader) -> None:
    first = "The harbour office opens at nine in the morning and closes at six in the evening, except"
    text = reader.read(_screen((100, first), (130, "on public holidays."), (220, "Dogs are welcome.")))
    assert text == f"{first} on public holidays.\n\nDogs are welcome."


def test_an_empty_screen_gives_no_text(reader: ScreenReader) -> None:
    assert reader.read(_screen()) == ""


@pytest.mark.parametrize("grain", [1, 4, 16])
def test_a_picture_without_words_gives_no_text(reader: ScreenReader, grain: int) -> None:
    blots = np.random.default_rng(0).integers(0, 256, (352 // grain, 640 // grain, 3), dtype=np.uint8)
    assert reader.read(blots.repeat(grain, axis=0).repeat(grain, axis=1)) == ""


def test_a_missing_language_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"tessdata\.fast-xyz"):
        ScreenReader("eng+xyz")
    with pytest.raises(MissingDependencyError, match=r"eng\.traineddata"):
        ScreenReader(data=tmp_path)
