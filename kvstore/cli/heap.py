# SPDX-License-Identifier: Apache-2.0
"""Gives memory that is free back to the system, where the C library keeps it."""

from __future__ import annotations

import ctypes


def release_free_memory() -> None:
    """Give free pages in the middle of the heap back: glibc keeps them, and a run of hours grows by what it keeps.

    Does nothing with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
