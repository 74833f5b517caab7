# SPDX-License-Identifier: Apache-2.0
"""Objects of streams: put, shared by forks, dropped; their bodies are kept like blocks, and counted."""

from __future__ import annotations

from contextlib import suppress

from kvstore.errors import ConfigError, CorruptRecordError, UnsupportedFormatError
from kvstore.spec import BlockKey
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.tables.blocks import add_reference, drop_reference, find_sound
from kvstore.tiers.tables.object_rows import ObjectRow, every_row, pack_row, row_key, stream_prefix, unpack_row


def object_rows(view: ReadView, stream_id: int, kind: str | None = None) -> list[ObjectRow]:
    """The objects of a stream, by kind and index; damaged rows are left out."""
    rows = every_row(view, stream_prefix(stream_id, kind))
    return [row for _, row in rows if isinstance(row, ObjectRow)]


def find_object(view: ReadView, stream_id: int, kind: str, index: int) -> ObjectRow | None:
    """Look up one object; raises like `unpack_row` where its row is damaged."""
    key = row_key(stream_id, kind, index)
    value = view.get(Table.META, key)
    return None if value is None else unpack_row(key, value)


def put_object(view: WriteView, stream_id: int, num_entries: int, row: ObjectRow) -> Extent | None:
    """Name an object whose body is in table `blocks` with a reference for it; one of the same kind and index goes.

    Args:
        view: the transaction.
        stream_id: the stream.
        num_entries: blocks that it has.
        row: the object.

    Returns:
        The extent that the replaced one's body leaves, to be freed after the commit.

    Raises:
        ConfigError: the stream is shorter than what the object describes.
    """
    if row.num_blocks > num_entries:
        raise ConfigError(
            f"object {row.kind} {row.index} describes {row.num_blocks} blocks; the stream has {num_entries}"
        )
    key = row_key(stream_id, row.kind, row.index)
    freed = _drop(view, key)
    view.put(Table.META, key, pack_row(key, row))
    return None if freed is None else freed[1]


def share_objects(view: WriteView, source_id: int, stream_id: int, num_blocks: int) -> None:
    """Give a fork the objects that describe no more than its blocks; what it has stays, what is lost is left out."""
    for row in object_rows(view, source_id):
        key = row_key(stream_id, row.kind, row.index)
        is_new = view.get(Table.META, key) is None
        if is_new and row.num_blocks <= num_blocks and find_sound(view, row.body) is not None:
            add_reference(view, row.body)
            view.put(Table.META, key, pack_row(key, row))


def drop_objects(
    view: WriteView, stream_id: int, kind: str | None = None, above: int = -1
) -> tuple[int, list[tuple[BlockKey, Extent]]]:
    """Drop objects of a stream.

    Args:
        view: the transaction.
        stream_id: the stream.
        kind: of one kind only.
        above: those that describe more blocks than this, and what is damaged.

    Returns:
        How many rows went, and the bodies that are gone, with the extents to free after the commit.
    """
    rows = list(every_row(view, stream_prefix(stream_id, kind)))
    keys = [key for key, row in rows if not isinstance(row, ObjectRow) or row.num_blocks > above]
    freed = [_drop(view, key) for key in keys]
    return len(keys), [each for each in freed if each is not None]


def _drop(view: WriteView, key: bytes) -> tuple[BlockKey, Extent] | None:
    """Delete a row, if it is there; a damaged one leaves its body behind, and verify reports that."""
    value = view.get(Table.META, key)
    if value is None:
        return None
    view.delete(Table.META, key)
    with suppress(CorruptRecordError, UnsupportedFormatError):
        body = unpack_row(key, value).body
        extent = drop_reference(view, body)
        return None if extent is None else (body, extent)
    return None
