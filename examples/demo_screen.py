# SPDX-License-Identifier: Apache-2.0
"""Draws pages as YUV 4:2:0 planes, and what moves on them: scrolling, the pointer and sensor-like noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from demo_pages import FONT, Page

WIDTH, HEIGHT = 1280, 720
SCROLL_STEPS = 4

_PAPER, _INK, _BAR, _NOTE = (250, 250, 246), (24, 24, 32), (205, 214, 228), (255, 238, 140)
_TITLE_HEIGHT = 56
_MARGIN, _ROW_HEIGHT = 48, 29
_SPACE = float(FONT.getlength(" "))
_BODY_TOP = 60
_NUM_NOISE_FIELDS = 8
_SPRITE = np.tril(np.ones((20, 14), dtype=bool))
_PAGE_DOWN = (WIDTH - 18, HEIGHT - 18)

Plane = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawn screen.

    Args:
        luma: [HEIGHT, WIDTH] uint8.
        chroma: [2, HEIGHT / 2, WIDTH / 2] uint8, U then V.
    """

    luma: Plane
    chroma: Plane


def draw(page: Page, *, progress: float) -> Picture:
    """Draw a page as a terminal window; `progress` (0 to 1) places the scroll bar."""
    image = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, WIDTH, _TITLE_HEIGHT), fill=_BAR)
    pen.text((_MARGIN, 14), page.title, font=FONT, fill=_INK)
    top = _TITLE_HEIGHT + 14 + int(progress * (HEIGHT - _TITLE_HEIGHT - 90))
    pen.rectangle((WIDTH - 16, top, WIDTH - 6, top + 60), fill=_BAR)
    y = float(_TITLE_HEIGHT + 16)
    for lines in page.paragraphs:
        for line in lines:
            if line.is_note:
                pen.rectangle((_MARGIN - 10, y - 2, WIDTH - 60, y + _ROW_HEIGHT - 3), fill=_NOTE)
            # A proportional blank is narrow; twice its width reads as an indent.
            pen.text((_MARGIN + 2 * line.indent * _SPACE, y), line.text, font=FONT, fill=_INK)
            y += _ROW_HEIGHT
        y += _ROW_HEIGHT / 2
    frame = av.VideoFrame.from_ndarray(np.asarray(image)).reformat(format="yuv420p")
    planes = frame.to_ndarray().astype(np.uint8, copy=False)
    return Picture(planes[:HEIGHT], planes[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2))


def scroll(above: Picture, below: Picture) -> Iterator[Picture]:
    """Yield `SCROLL_STEPS` pictures in which `below` pushes the text of `above` out at the top."""
    for step in range(1, SCROLL_STEPS + 1):
        shift = (HEIGHT - _BODY_TOP) * step // (SCROLL_STEPS + 1) // 2 * 2
        yield Picture(
            _pushed(above.luma, below.luma, shift, _BODY_TOP, axis=0),
            _pushed(above.chroma, below.chroma, shift // 2, _BODY_TOP // 2, axis=1),
        )


def _pushed(above: Plane, below: Plane, shift: int, top: int, *, axis: int) -> Plane:
    title, body = np.split(above, [top], axis=axis)
    new_body = np.split(below, [top], axis=axis)[1]
    gone, kept = np.split(body, [shift], axis=axis)
    return np.concatenate((title, kept, np.split(new_body, [gone.shape[axis]], axis=axis)[0]), axis=axis)


class Camera:
    """Turns pictures into frames: adds noise and a pointer that wanders, then rests at the foot of the scroll bar.

    Args:
        rng: the only source of chance.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        flips = rng.integers(0, 10, (_NUM_NOISE_FIELDS, HEIGHT, WIDTH), dtype=np.uint8)
        # 0 or 2 for one pixel in five, 1 for the others; `shoot` takes 1 off again.
        self._noise = np.where(flips == 0, np.uint8(0), np.where(flips == 9, np.uint8(2), np.uint8(1)))
        self._pointer = np.array(_PAGE_DOWN, dtype=np.float64)
        self._goal = self._pointer.copy()

    def shoot(self, picture: Picture, *, at_rest: bool) -> av.VideoFrame:
        """Return the next frame; `at_rest` sends the pointer to the foot of the scroll bar, out of the text."""
        if at_rest:
            self._goal = np.array(_PAGE_DOWN, dtype=np.float64)
            self._pointer = self._goal.copy()
        elif np.abs(self._goal - self._pointer).max() < 4:
            self._goal = self._rng.uniform((60, 80), (WIDTH - 60, HEIGHT - 60))
        self._pointer += 0.5 * (self._goal - self._pointer)
        planes = np.empty((HEIGHT * 3 // 2, WIDTH), dtype=np.uint8)
        # Video luma is 16 to 235, so the noise cannot wrap around.
        np.add(picture.luma, self._noise[self._rng.integers(_NUM_NOISE_FIELDS)], out=planes[:HEIGHT])
        planes[:HEIGHT] -= 1
        planes[HEIGHT:] = picture.chroma.reshape(HEIGHT // 2, WIDTH)
        x, y = self._pointer.astype(int)
        window = planes[y : y + 20, x : x + 14]
        window[_SPRITE[: window.shape[0], : window.shape[1]]] = 40
        return av.VideoFrame.from_ndarray(planes, format="yuv420p")
