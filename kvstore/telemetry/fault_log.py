# SPDX-License-Identifier: Apache-2.0
"""Faults that calls survive, as log lines that programs can read: one JSON object each, and never a flood of them."""

from __future__ import annotations

import json
import logging
import threading
import time

_LOG = logging.getLogger("kvstore.faults")
_INTERVAL_S = 1.0


class _Throttle:
    """Lets each event through once an interval, and counts the rest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: dict[str, tuple[float, int]] = {}

    def pass_through(self, event: str) -> int | None:
        """Return how many were held back since the last that passed; None when this one is held back."""
        now = time.monotonic()
        with self._lock:
            last, held = self._state.get(event, (-_INTERVAL_S, 0))
            if now - last < _INTERVAL_S:
                self._state[event] = (last, held + 1)
                return None
            self._state[event] = (now, 0)
            return held


_THROTTLE = _Throttle()


def log_fault(event: str, **fields: int | float | str) -> None:
    """Log a fault as a warning of the logger `kvstore.faults`, at most one of an event a second.

    Args:
        event: what happened, such as `block damaged`.
        fields: where, and why; `more` is added where others were held back.
    """
    held = _THROTTLE.pass_through(event)
    if held is None or not _LOG.isEnabledFor(logging.WARNING):
        return
    more = {"more": held} if held else {}
    _LOG.warning("%s", json.dumps({"event": event, **fields, **more}))
