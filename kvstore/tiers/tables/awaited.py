# SPDX-License-Identifier: Apache-2.0
"""Table `meta`: lost blocks that entries of streams still name, with how many do: they come back counted."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.spec import BlockKey
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.tables.object_rows import count_rows
from kvstore.tiers.tables.records import unpack_entry

_PREFIX = b"awaited "  # then the block's key
_COUNT = struct.Struct("<Q")


def count_entries(view: ReadView, key: BlockKey) -> int:
    """Count the entries and objects of all streams that name a block or body; reads both tables whole."""
    found = count_rows(view, key)
    for _, value in view.scan(Table.ENTRIES):
        with suppress(CorruptRecordError, UnsupportedFormatError):
            found += unpack_entry(0, value).key == key
    return found


def count_awaiting(view: ReadView, key: BlockKey) -> int:
    """Entries that name a block that is not stored."""
    value = view.get(Table.META, _PREFIX + key)
    if value is not None and len(value) != _COUNT.size:
        return count_entries(view, key)  # the row is damaged
    return 0 if value is None else int(_COUNT.unpack(value)[0])


def find_awaited(view: ReadView, keys: Iterable[BlockKey]) -> set[BlockKey]:
    """Those of the keys that entries name, of blocks that are not stored."""
    found = view.get_many(Table.META, [_PREFIX + key for key in keys])
    return {BlockKey(row[len(_PREFIX) :]) for row in found}


def set_awaiting(view: WriteView, key: BlockKey, count: int) -> None:
    """Note how many entries name a block that is not stored; 0 for one that is."""
    if count > 0:
        view.put(Table.META, _PREFIX + key, _COUNT.pack(count))
    else:
        view.delete(Table.META, _PREFIX + key)


def awaited_rows(view: ReadView) -> dict[bytes, bytes]:
    """All rows as they are, damaged ones included."""
    return dict(view.scan(Table.META, prefix=_PREFIX))


def make_rows(counts: Mapping[BlockKey, int]) -> dict[bytes, bytes]:
    """The rows that there should be."""
    return {_PREFIX + key: _COUNT.pack(count) for key, count in counts.items()}
