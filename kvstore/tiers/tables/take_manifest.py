# SPDX-License-Identifier: Apache-2.0
"""A snapshot of a long stream, in short transactions: none holds up who cleans, nor keeps the catalogue in memory."""

from __future__ import annotations

from kvstore.tiers.catalogue import Catalogue
from kvstore.tiers.manifest import Manifest
from kvstore.tiers.tables.streams import read_manifest

_MOST_ENTRIES = 16384


def take_manifest(catalogue: Catalogue, name: str, known: Manifest | None = None) -> Manifest:
    """Read a stream's manifest; raises like `read_manifest`.

    Entries of a stream that was not cut stay, so that those of several transactions are of one snapshot: the last's.

    Args:
        catalogue: where the stream is.
        name: of the stream.
        known: an earlier snapshot; see `read_manifest`.
    """
    while True:
        with catalogue.read() as view:
            known = read_manifest(view, name, known, _MOST_ENTRIES)
        catalogue.pages.let_go()
        if known.is_whole:
            return known
