# SPDX-License-Identifier: Apache-2.0
"""Bytes of extents, for readers, who have no allocator to ask: counted from the catalogue's table, part by part."""

from __future__ import annotations

import threading
import time
from itertools import islice

from kvstore.tiers.catalogue import Catalogue, Table
from kvstore.tiers.tables.records import is_extent, unpack_extent

_PART_ROWS = 16384
_SHORT_S = 0.01
_SHARE = 0.01


class TakenBytes:
    """Counts what a catalogue names; where that takes long, a count serves for a hundred times as long. Thread-safe.

    Args:
        catalogue: of the store.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._lock = threading.Lock()
        self._nbytes = 0
        self._counts_again_s = 0.0

    def nbytes(self) -> int:
        """Bytes of all extents; those of damaged rows do not count."""
        with self._lock:
            began = time.monotonic()
            if began >= self._counts_again_s:
                self._nbytes = self._count()
                took_s = time.monotonic() - began
                self._counts_again_s = began + took_s / _SHARE if took_s > _SHORT_S else began
            return self._nbytes

    def _count(self) -> int:
        """All rows, in short transactions: a writer may go on meanwhile, and this is a figure for people."""
        total, start = 0, b""
        while True:
            with self._catalogue.read() as view:
                rows = list(islice(view.scan(Table.EXTENTS, start=start), _PART_ROWS))
            self._catalogue.pages.let_go()
            total += sum(unpack_extent(*row)[0].nbytes for row in rows if is_extent(*row))
            if len(rows) < _PART_ROWS:
                return total
            start = rows[-1][0] + b"\x00"  # the next key there may be
