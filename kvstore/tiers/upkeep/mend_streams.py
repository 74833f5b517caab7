# SPDX-License-Identifier: Apache-2.0
"""Mends the tables of the streams: drops what belongs to none, fills gaps in manifests, counts who needs a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import groupby

from kvstore.errors import CorruptRecordError, KVStoreError
from kvstore.spec import BLOCK_KEY_NBYTES, BlockKey
from kvstore.tiers.catalogue import Table, WriteView
from kvstore.tiers.tables.calibrations import parse_row
from kvstore.tiers.tables.cuts import note_cut
from kvstore.tiers.tables.meta import ensure_stream_counter
from kvstore.tiers.tables.object_rows import PREFIX, ObjectRow, every_row, stream_id_of, stream_prefix
from kvstore.tiers.tables.records import (
    Entry,
    StreamState,
    pack_entry,
    pack_state,
    position_index,
    position_key,
    unpack_entry,
    unpack_state,
)
from kvstore.tiers.tables.streams import STREAM_ID_NBYTES, StreamRow, every_stream

LOST_KEY = BlockKey(bytes(BLOCK_KEY_NBYTES))
"""Key of an entry whose own key is not known any more; no block has it."""

_MAX_MISSING = 1024
_COMPLETE = b'{"is_complete":true}'


def mend_streams(
    view: WriteView, stored: Collection[BlockKey], mended: list[str]
) -> tuple[Counter[BlockKey], list[tuple[str, int]]]:
    """Make every manifest whole.

    Args:
        view: the transaction.
        stored: blocks and bodies that are there.
        mended: gains what was done, in words.

    Returns:
        How many entries and objects name each block or body; stream and index of those whose block is not stored.
    """
    needed: Counter[BlockKey] = Counter()
    lost: list[tuple[str, int]] = []
    owned: set[bytes] = set()
    for packed_name, row in list(every_stream(view)):
        if isinstance(row, StreamRow):
            owned.add(row.stream_id.to_bytes(STREAM_ID_NBYTES, "big"))
            entries = _Manifest(view, row, mended).mend()
            for entry in entries:
                needed[entry.key] += 1
                if entry.key not in stored:
                    lost.append((row.header.name, entry.index))
            needed.update(_mend_objects(view, row, len(entries), stored, mended))
        else:
            view.delete(Table.STREAMS, packed_name)
            mended.append(f"stream {packed_name!r} was dropped: {row}")
    _drop_orphans(view, owned, mended)
    if ensure_stream_counter(view, max((int.from_bytes(each, "big") for each in owned), default=0)):
        mended.append("the counter of streams was damaged")
    _drop_calibrations(view, mended)
    return needed, lost


class _Manifest:
    """The rows of one stream."""

    def __init__(self, view: WriteView, row: StreamRow, mended: list[str]) -> None:
        self._view = view
        self._row = row
        self._mended = mended
        self._prefix = row.stream_id.to_bytes(STREAM_ID_NBYTES, "big")

    def mend(self) -> list[Entry]:
        """Drop what cannot be read, put entries without a block in its place; returns all entries in order."""
        found = self._entries()
        state = self._state(max(found, default=-1) + 1)
        count = max(found, default=-1) + 1 if state is None else state.num_entries
        for index in [index for index in found if index >= count]:
            self._view.delete(Table.ENTRIES, position_key(self._row.stream_id, index))
            del found[index]
            self._say(f"entry {index} lies behind its end and was dropped")
        end_token = 0 if state is None else state.num_tokens
        entries = _without_gaps(found, count, end_token)
        for entry in entries:
            if entry.index not in found:
                self._view.put(Table.ENTRIES, position_key(self._row.stream_id, entry.index), pack_entry(entry))
                self._say(f"entry {entry.index} was damaged: its block is lost")
        num_tokens = sum(entry.num_tokens for entry in entries)
        if state is None:
            self._say("its cursor was damaged: it counts as complete")
        if state is None or state.num_tokens != num_tokens:
            # Whoever produced it cannot go on without a cursor: a wrong place would be worse than none.
            mended = StreamState(count, num_tokens, _COMPLETE if state is None else state.cursor_json)
            self._view.put(Table.STATES, self._prefix, pack_state(mended))
            self._say(f"it holds {count} entries and {num_tokens} tokens")
        return entries

    def _entries(self) -> dict[int, Entry]:
        found: dict[int, Entry] = {}
        for key, value in list(self._view.scan(Table.ENTRIES, prefix=self._prefix)):
            try:
                index = position_index(key)
                found[index] = unpack_entry(index, value)
            except KVStoreError:
                self._view.delete(Table.ENTRIES, key)
        return found

    def _state(self, num_found: int) -> StreamState | None:
        """The stream's state; None when it is gone, damaged, or says what cannot be."""
        value = self._view.get(Table.STATES, self._prefix)
        try:
            state = None if value is None else unpack_state(value)
        except KVStoreError:
            return None
        return state if state is not None and state.num_entries <= num_found + _MAX_MISSING else None

    def _say(self, what: str) -> None:
        note_cut(self._view, self._row.stream_id)
        self._mended.append(f"stream {self._row.header.name!r}: {what}")


def _without_gaps(found: dict[int, Entry], count: int, end_token: int) -> list[Entry]:
    """Fill missing indices with entries that take the tokens and the time between their neighbours."""
    entries: list[Entry] = []
    for is_there, group in groupby(range(count), key=lambda index: index in found):
        indices = list(group)
        if is_there:
            entries += [found[index] for index in indices]
            continue
        before, after = entries[-1] if entries else None, found.get(indices[-1] + 1)
        token = before.first_token + before.num_tokens if before else 0
        start_s = before.end_s if before else after.start_s if after else 0.0
        stop_s = after.start_s if after else start_s
        missing = max(0, (after.first_token if after else end_token) - token)
        for position, index in enumerate(indices):
            num_tokens = min(65535, missing // len(indices) + (position < missing % len(indices)))
            entries.append(Entry(index, LOST_KEY, num_tokens, token, start_s, stop_s, -1))
            token += num_tokens
    return entries


def _mend_objects(
    view: WriteView, row: StreamRow, num_entries: int, stored: Collection[BlockKey], mended: list[str]
) -> list[BlockKey]:
    """Drop objects of a stream that are damaged, lost, or describe what is not there; returns bodies of the others."""
    bodies: list[BlockKey] = []
    for key, each in list(every_row(view, stream_prefix(row.stream_id))):
        if isinstance(each, ObjectRow) and each.body in stored and each.num_blocks <= num_entries:
            bodies.append(each.body)
            continue
        view.delete(Table.META, key)
        what = f"object {each.kind} {each.index}" if isinstance(each, ObjectRow) else "an object"
        mended.append(f"stream {row.header.name!r}: {what} was damaged and is dropped")
    return bodies


def _drop_orphans(view: WriteView, owned: Collection[bytes], mended: list[str]) -> None:
    for table in (Table.STATES, Table.ENTRIES, Table.SUMMARIES):
        orphans = [key for key in view.keys(table) if key[:STREAM_ID_NBYTES] not in owned]
        for key in orphans:
            view.delete(table, key)
        if orphans:
            mended.append(f"table {table.value.decode()}: {len(orphans)} rows of no stream dropped")
    objects = [key for key, _ in view.scan(Table.META, prefix=PREFIX) if stream_id_of(key) not in owned]
    for key in objects:
        view.delete(Table.META, key)
    if objects:
        mended.append(f"{len(objects)} objects of no stream dropped")


def _drop_calibrations(view: WriteView, mended: list[str]) -> None:
    for key, value in list(view.scan(Table.CALIBRATIONS)):
        try:
            parse_row(key, value)
        except CorruptRecordError as error:
            view.delete(Table.CALIBRATIONS, key)
            mended.append(f"calibrations: row {key.hex()[:18]} dropped: {error}")
        except KVStoreError:
            continue  # newer than this program
