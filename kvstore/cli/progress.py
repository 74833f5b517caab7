# SPDX-License-Identifier: Apache-2.0
"""A progress bar: one line redrawn on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TextIO

_BAR_WIDTH = 20
_REDRAW_S = 0.1
_LINE_S = 10.0


class Progress:
    """Shows where a long command stands; use it with `with`, so that the last state is left on the screen.

    Args:
        stream: where to; redrawn in place if it is a terminal.
        clock: seconds that only grow.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._redraws = stream.isatty()
        self._period_s = _REDRAW_S if self._redraws else _LINE_S
        self._shown_s: float | None = None
        self._pending: str | None = None
        self._is_open_line = False
        self._is_noted = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, fraction: float | None, parts: Sequence[str]) -> None:
        """Show a new state, unless the last one was shown a moment ago.

        Args:
            fraction: how much is done, 0 to 1; None when nobody knows.
            parts: what else to say.
        """
        self._pending = self._line(fraction, parts)
        now_s = self._clock()
        if self._shown_s is None or now_s - self._shown_s >= self._period_s:
            self._shown_s = now_s
            self._draw()

    def note(self, words: str) -> None:
        """Say what is being waited for, on a terminal; it leaves no trace."""
        if self._redraws:
            print(f"\r\x1b[K{words}\r", end="", file=self._stream, flush=True)
            self._is_noted = True

    def say(self, words: str) -> None:
        """Write a line of its own."""
        self.close()
        print(words, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen and end its line."""
        if self._pending is not None:
            self._draw()
        if self._is_open_line:
            self._is_open_line = False
            print(file=self._stream, flush=True)
        elif self._is_noted:
            print("\x1b[K", end="", file=self._stream, flush=True)
        self._is_noted = False

    def _draw(self) -> None:
        if self._redraws:
            print(f"\r\x1b[K{self._pending}", end="", file=self._stream, flush=True)
            self._is_open_line = True
        else:
            print(self._pending, file=self._stream, flush=True)
        self._pending = None

    def _line(self, fraction: float | None, parts: Sequence[str]) -> str:
        words = "  ".join(parts)
        if fraction is None:
            bar = ""
        else:
            filled = round(min(max(fraction, 0.0), 1.0) * _BAR_WIDTH)
            bar = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {fraction:4.0%}  "
        if not self._redraws:
            return bar + words
        # A line that wraps cannot be redrawn.
        room = shutil.get_terminal_size().columns - 1
        return (bar + words if len(bar + words) <= room else words)[:room]
