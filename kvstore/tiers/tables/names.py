# SPDX-License-Identifier: Apache-2.0
"""Names of the catalogue's tables."""

from __future__ import annotations

from enum import Enum


class Table(Enum):
    """The named databases of LMDB; docs/file-format.md says what each holds."""

    META = b"meta"
    STREAMS = b"streams"
    STATES = b"states"
    ENTRIES = b"entries"
    SUMMARIES = b"summaries"
    BLOCKS = b"blocks"
    DIRECTORIES = b"directories"
    EXTENTS = b"extents"
    LRU = b"lru"
    CALIBRATIONS = b"calibrations"
