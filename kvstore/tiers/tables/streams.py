# SPDX-License-Identifier: Apache-2.0
"""Tables `streams`, `states`, `entries`, `summaries`: the manifests, changed only together with their blocks."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from kvstore.errors import (
    ConfigError,
    CorruptRecordError,
    KVStoreError,
    StreamNotFoundError,
    UnsupportedFormatError,
)
from kvstore.spec import BlockKey
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.manifest import Manifest, StreamHeader, check_name, load_json
from kvstore.tiers.tables.blocks import add_reference, await_block, drop_reference
from kvstore.tiers.tables.cuts import count_cuts, forget_cuts
from kvstore.tiers.tables.entries import Entries
from kvstore.tiers.tables.meta import next_stream_id
from kvstore.tiers.tables.objects import drop_objects
from kvstore.tiers.tables.records import (
    ENTRY_NBYTES,
    VALUE_VERSION,
    Entry,
    StreamState,
    pack_entry,
    pack_state,
    position_index,
    position_key,
    unpack_entry,
    unpack_state,
)

_STREAM = struct.Struct("<BxxxIQ")  # version, header bytes, stream id; then the header JSON
_STREAM_ID = struct.Struct(">Q")
STREAM_ID_NBYTES = _STREAM_ID.size
"""Bytes of the id that begins the keys of tables `states`, `entries` and `summaries`."""
_BATCH_ENTRIES = 4096


@dataclass(frozen=True, slots=True)
class StreamRow:
    """A stream as the catalogue finds it: its id inside the store, and its header."""

    stream_id: int
    header: StreamHeader


def find_stream(view: ReadView, name: str) -> StreamRow:
    """Look up a stream.

    Raises:
        StreamNotFoundError: there is none of that name.
        CorruptRecordError: its header is damaged.
    """
    value = view.get(Table.STREAMS, check_name(name))
    if value is None:
        raise StreamNotFoundError(f"the store holds no stream {name!r}")
    return _unpack_stream(name, value)


def find_stream_id(view: ReadView, name: str) -> int:
    """Look up a stream's id alone; raises like `find_stream`, and does not look at the header."""
    value = view.get(Table.STREAMS, check_name(name))
    if value is None:
        raise StreamNotFoundError(f"the store holds no stream {name!r}")
    return _unpack_fixed(name, value)


def stream_rows(view: ReadView) -> Iterator[StreamRow]:
    """Yield all streams by name; raises `CorruptRecordError` at a damaged one."""
    for _, row in every_stream(view):
        if not isinstance(row, StreamRow):
            raise row
        yield row


def every_stream(view: ReadView) -> Iterator[tuple[bytes, StreamRow | KVStoreError]]:
    """Yield all streams by their keys; a damaged one as the error that says so."""
    for key, value in view.scan(Table.STREAMS):
        try:
            yield key, _unpack_stream(key.decode(), value)
        except UnicodeDecodeError:
            yield key, CorruptRecordError(f"stream name {key!r} is not UTF-8")
        except KVStoreError as error:
            yield key, error


def stream_ids(view: ReadView) -> Iterator[tuple[str, int]]:
    """Yield name and id of all streams without looking at their headers; damaged ones are left out."""
    for key, value in view.scan(Table.STREAMS):
        with suppress(UnicodeDecodeError, CorruptRecordError, UnsupportedFormatError):
            name = key.decode()
            yield name, _unpack_fixed(name, value)


def ensure_stream(view: WriteView, header: StreamHeader) -> None:
    """Create an empty stream, unless there is an equal one.

    Raises:
        ConfigError: there is another stream of that name.
        CorruptRecordError: the header of the stream of that name is damaged.
    """
    key = check_name(header.name)
    present = view.get(Table.STREAMS, key)
    if present is not None:
        if not _unpack_stream(header.name, present).header.describes_same(header):
            raise ConfigError(f"stream {header.name!r} exists and was made otherwise; remove it or use another name")
        return
    stream_id = next_stream_id(view)
    data = header.to_json()
    view.put(Table.STREAMS, key, _STREAM.pack(VALUE_VERSION, len(data), stream_id) + data)
    view.put(Table.STATES, _STREAM_ID.pack(stream_id), pack_state(StreamState(0, 0, b"{}")))


def find_state(view: ReadView, stream_id: int) -> StreamState:
    """Return what grows in a stream; raises `StreamNotFoundError` when it was removed."""
    value = view.get(Table.STATES, _STREAM_ID.pack(stream_id))
    if value is None:
        raise StreamNotFoundError(f"stream {stream_id} was removed")
    return unpack_state(value)


def append_entries(
    view: WriteView, stream_id: int, entries: Sequence[Entry], summaries: Sequence[bytes], cursor_json: bytes
) -> None:
    """Append to a manifest and move its cursor; the entries' blocks are in the catalogue already.

    Raises:
        StreamNotFoundError: the stream was removed.
        CorruptRecordError: an entry leaves a gap, or its block is not stored.
    """
    state = find_state(view, stream_id)
    for position, (entry, summary) in enumerate(zip(entries, summaries, strict=True), start=state.num_entries):
        if entry.index != position:
            raise CorruptRecordError(f"stream {stream_id}: entry {entry.index} where {position} was expected")
        add_reference(view, entry.key)
        view.put(Table.ENTRIES, position_key(stream_id, position), pack_entry(entry))
        view.put(Table.SUMMARIES, position_key(stream_id, position), summary)
    grown = StreamState(
        state.num_entries + len(entries), state.num_tokens + sum(e.num_tokens for e in entries), cursor_json
    )
    view.put(Table.STATES, _STREAM_ID.pack(stream_id), pack_state(grown))


def restore_stream(
    view: WriteView, header: StreamHeader, state: StreamState, rows: Iterable[tuple[Entry, bytes | None]]
) -> list[BlockKey]:
    """Make a whole stream at once; entries may name blocks that are not stored, which are counted when they come.

    Args:
        view: the transaction.
        header: of the stream, of whose name there is none, or an empty one with an equal header.
        state: what grows in a stream; fits `rows`.
        rows: entries in order, each with its summary, if it has one.

    Returns:
        The blocks that are not stored.

    Raises:
        ConfigError: there is another stream of that name.
    """
    ensure_stream(view, header)
    stream_id = find_stream(view, header.name).stream_id
    if find_state(view, stream_id).num_entries > 0:
        raise ConfigError(f"stream {header.name!r} exists; remove it or use another name")
    missing: dict[BlockKey, None] = {}
    for entry, summary in rows:
        if not await_block(view, entry.key):
            missing[entry.key] = None
        view.put(Table.ENTRIES, position_key(stream_id, entry.index), pack_entry(entry))
        if summary is not None:
            view.put(Table.SUMMARIES, position_key(stream_id, entry.index), summary)
    view.put(Table.STATES, _STREAM_ID.pack(stream_id), pack_state(state))
    return list(missing)


def read_entries(view: ReadView, stream_id: int, first: int = 0) -> Iterator[Entry]:
    """Yield entries from index `first` on, in order; raises `CorruptRecordError` at a damaged one."""
    prefix = _STREAM_ID.pack(stream_id)
    for key, value in view.scan(Table.ENTRIES, start=position_key(stream_id, first), prefix=prefix):
        yield unpack_entry(position_index(key), value)


def read_manifest(view: ReadView, name: str, known: Manifest | None = None, most: int | None = None) -> Manifest:
    """Take a snapshot of a stream.

    Args:
        view: the transaction.
        name: of the stream.
        known: an earlier snapshot: what it has of a stream that has only grown since is not read again.
        most: entries to read; `is_whole` says whether there are others.

    Raises:
        StreamNotFoundError: there is none of that name.
        CorruptRecordError: a part is damaged, or entries are missing.
    """
    row = find_stream(view, name)
    state = find_state(view, row.stream_id)
    lineage = (row.stream_id, count_cuts(view, row.stream_id))
    has_grown = known is not None and known.lineage == lineage and len(known.entries) <= state.num_entries
    entries = Entries.of(known.entries) if known is not None and has_grown else Entries()
    wanted = state.num_entries if most is None else min(len(entries) + most, state.num_entries)
    prefix = _STREAM_ID.pack(row.stream_id)
    rows = view.scan(Table.ENTRIES, start=position_key(row.stream_id, len(entries)), prefix=prefix)
    while batch := list(islice(rows, min(wanted - len(entries), _BATCH_ENTRIES))):
        places = range(len(entries), len(entries) + len(batch))
        if [key for key, _ in batch] != [position_key(row.stream_id, place) for place in places]:
            break
        if any(len(value) != ENTRY_NBYTES for _, value in batch):
            for place, (_, value) in zip(places, batch, strict=True):
                unpack_entry(place, value)
        entries = entries.followed_by_packed(b"".join(value for _, value in batch))
    if len(entries) != wanted or (wanted == state.num_entries and next(rows, None) is not None):
        num_found = sum(1 for _ in view.scan(Table.ENTRIES, prefix=prefix))
        raise CorruptRecordError(f"stream {name!r}: {num_found} entries found, {state.num_entries} announced")
    cursor = load_json(state.cursor_json, f"cursor of stream {name!r}")
    return Manifest(row.header, entries, cursor, state.num_tokens, lineage, wanted == state.num_entries)


def read_summaries(view: ReadView, stream_id: int, first: int, count: int) -> dict[int, bytes]:
    """Return the summaries of entries `first` to `first + count` by index; those that are missing are left out."""
    found = {index: view.get(Table.SUMMARIES, position_key(stream_id, index)) for index in range(first, first + count)}
    return {index: data for index, data in found.items() if data is not None}


def delete_stream(view: WriteView, name: str) -> list[tuple[BlockKey, Extent]]:
    """Remove a stream, its objects, and the blocks that only it needed.

    Returns:
        The blocks and bodies that are gone, with the extents to free after the commit.

    Raises:
        StreamNotFoundError: there is none of that name.
    """
    stream_key = check_name(name)
    stream_id = find_stream_id(view, name)
    prefix = _STREAM_ID.pack(stream_id)
    _, freed = drop_objects(view, stream_id)
    for position, packed in list(view.scan(Table.ENTRIES, prefix=prefix)):
        # A damaged entry must not make its stream immortal; the block it named stays, and verify reports it.
        with suppress(CorruptRecordError):
            key = unpack_entry(position_index(position), packed).key
            extent = drop_reference(view, key)
            if extent is not None:
                freed.append((key, extent))
        view.delete(Table.ENTRIES, position)
        view.delete(Table.SUMMARIES, position)
    view.delete(Table.STATES, prefix)
    view.delete(Table.STREAMS, stream_key)
    forget_cuts(view, stream_id)
    return freed


def _unpack_fixed(name: str, value: bytes) -> int:
    if len(value) < _STREAM.size:
        raise CorruptRecordError(f"stream {name!r}: {len(value)} bytes")
    version, header_nbytes, stream_id = _STREAM.unpack_from(value)
    if version > VALUE_VERSION:
        raise UnsupportedFormatError(f"stream {name!r}: version {version}; this program reads up to {VALUE_VERSION}")
    if version != VALUE_VERSION or len(value) - _STREAM.size != header_nbytes:
        found_nbytes = len(value) - _STREAM.size
        raise CorruptRecordError(f"stream {name!r}: {found_nbytes} bytes of header, {header_nbytes} announced")
    found: int = stream_id
    return found


def _unpack_stream(name: str, value: bytes) -> StreamRow:
    stream_id = _unpack_fixed(name, value)
    return StreamRow(stream_id, StreamHeader.from_json(name, value[_STREAM.size :]))
