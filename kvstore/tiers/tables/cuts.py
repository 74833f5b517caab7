# SPDX-License-Identifier: Apache-2.0
"""Table `meta`: how often entries of a stream were taken away or changed, so that who knows them notices."""

from __future__ import annotations

import struct

from kvstore.tiers.catalogue import ReadView, Table, WriteView

_KEY = struct.Struct(">4sQ")  # "cut ", stream id
_COUNT = struct.Struct("<Q")


def count_cuts(view: ReadView, stream_id: int) -> int:
    """Times that a stream did not just grow; a damaged row counts as none, and the next cut mends it."""
    value = view.get(Table.META, _key(stream_id))
    return 0 if value is None or len(value) != _COUNT.size else int(_COUNT.unpack(value)[0])


def note_cut(view: WriteView, stream_id: int) -> None:
    """Entries of the stream are taken away, or changed, in this transaction."""
    count = count_cuts(view, stream_id)
    view.put(Table.META, _key(stream_id), _COUNT.pack((count + 1) % (1 << 64)))


def forget_cuts(view: WriteView, stream_id: int) -> None:
    """The stream is removed; ids are never used twice."""
    view.delete(Table.META, _key(stream_id))


def _key(stream_id: int) -> bytes:
    return _KEY.pack(b"cut ", stream_id)
