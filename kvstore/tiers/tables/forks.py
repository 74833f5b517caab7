# SPDX-License-Identifier: Apache-2.0
"""Streams that share a beginning: copied and cut in the tables alone, blocks stay where they are and are counted."""

from __future__ import annotations

import struct
from contextlib import suppress

from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.spec import BlockKey
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.manifest import StreamHeader, check_name
from kvstore.tiers.tables.blocks import drop_reference
from kvstore.tiers.tables.cuts import note_cut
from kvstore.tiers.tables.objects import drop_objects, share_objects
from kvstore.tiers.tables.records import Entry, StreamState, pack_state, position_index, position_key, unpack_entry
from kvstore.tiers.tables.streams import (
    StreamRow,
    append_entries,
    ensure_stream,
    find_state,
    find_stream,
    read_entries,
)

_STREAM_ID = struct.Struct(">Q")


def fork_stream(view: WriteView, source: str, header: StreamHeader, at: int | None, cursor_json: bytes | None) -> None:
    """Make a stream whose first entries, and the objects that describe no more, are those of another.

    Each of their blocks and bodies has one reference more.

    Args:
        view: the transaction.
        source: name of the other stream.
        header: header of the new one.
        at: tokens to share, the end of an entry; None for all.
        cursor_json: where the producer of the new stream stands; None for where that of `source` does.

    Raises:
        StreamNotFoundError: there is no stream `source`.
        ConfigError: `at` is not the end of an entry, or there is a stream of the new name.
        CorruptRecordError: an entry is damaged or missing, or its block is gone.
    """
    row = find_stream(view, source)
    if view.get(Table.STREAMS, check_name(header.name)) is not None:
        raise ConfigError(f"there is a stream {header.name!r}; remove it or use another name")
    state = find_state(view, row.stream_id)
    entries = _entries_until(view, source, row, state, at)
    ensure_stream(view, header)
    summaries = [view.get(Table.SUMMARIES, position_key(row.stream_id, entry.index)) or b"" for entry in entries]
    chosen = state.cursor_json if cursor_json is None else cursor_json
    stream_id = find_stream(view, header.name).stream_id
    append_entries(view, stream_id, entries, summaries, chosen)
    share_objects(view, row.stream_id, stream_id, len(entries))


def cut_stream(view: WriteView, name: str, at: int, cursor_json: bytes) -> list[tuple[BlockKey, Extent]]:
    """Remove the entries from a token on, objects that describe them, and the blocks that nothing else needs.

    Args:
        view: the transaction.
        name: the stream.
        at: tokens that stay, the end of an entry.
        cursor_json: where the producer stands now.

    Returns:
        The blocks and bodies that are gone, with the extents to free after the commit.

    Raises:
        StreamNotFoundError: there is none of that name.
        ConfigError: `at` is not the end of an entry.
        CorruptRecordError: an entry that stays is damaged or missing.
    """
    row = find_stream(view, name)
    kept = _entries_until(view, name, row, find_state(view, row.stream_id), at)
    prefix = _STREAM_ID.pack(row.stream_id)
    _, freed = drop_objects(view, row.stream_id, above=len(kept))
    for position, packed in list(view.scan(Table.ENTRIES, start=position_key(row.stream_id, len(kept)), prefix=prefix)):
        with suppress(CorruptRecordError):  # as when the stream is removed: what it named stays, and verify reports it
            key = unpack_entry(position_index(position), packed).key
            extent = drop_reference(view, key)
            if extent is not None:
                freed.append((key, extent))
        view.delete(Table.ENTRIES, position)
        view.delete(Table.SUMMARIES, position)
    view.put(Table.STATES, prefix, pack_state(StreamState(len(kept), at, cursor_json)))
    note_cut(view, row.stream_id)
    return freed


def _entries_until(view: ReadView, name: str, row: StreamRow, state: StreamState, at: int | None) -> list[Entry]:
    wanted = state.num_tokens if at is None else at
    entries: list[Entry] = []
    end = 0
    for entry in read_entries(view, row.stream_id):
        if end >= wanted:
            break
        if entry.index != len(entries):
            raise CorruptRecordError(f"stream {name!r}: entry {entry.index} where {len(entries)} was expected")
        begin, end = end, end + entry.num_tokens
        if end > wanted:
            raise ConfigError(f"stream {name!r}: token {wanted} is inside a block; use {begin} or {end}")
        entries.append(entry)
    if end != wanted:
        raise ConfigError(f"stream {name!r} has {end} tokens; {wanted} is not among them")
    return entries
