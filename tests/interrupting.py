# SPDX-License-Identifier: Apache-2.0
"""Interrupts a call at a chosen place, as Ctrl-C may."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


def interrupt_at(number: int, call: Callable[[], object], counts: Callable[[CodeType], bool]) -> bool:
    """Run a call, and raise KeyboardInterrupt in it where a function that `counts` is called for the `number`th time.

    Returns:
        Whether that came out of the call.
    """
    left = number

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        if counts(frame.f_code):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
