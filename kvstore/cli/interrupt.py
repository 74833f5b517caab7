# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that lets the work at hand be finished."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

_STDERR = 2


class Interruptible:
    """Lets the first Ctrl-C wait for the next `check`; a second one does not wait.

    An ingest checks when what it reads is stored, and between steps of a calibration: what was read of that screen is
    read again by the run that goes on.
    """

    def __init__(self) -> None:
        self._is_stopping = False

    def __enter__(self) -> Interruptible:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C was pressed."""
        if self._is_stopping:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_stopping:
            raise KeyboardInterrupt
        self._is_stopping = True
        # A signal may arrive inside a buffered write, which must not be entered twice.
        os.write(_STDERR, b"\nstopping after this screen, or this step of calibrating; Ctrl-C again stops at once\n")
