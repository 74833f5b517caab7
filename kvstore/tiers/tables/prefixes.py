# SPDX-License-Identifier: Apache-2.0
"""The longest run of stored blocks that some stream has for coming tokens, found by the names they would get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from kvstore.errors import KVStoreError
from kvstore.spec import BlockKey
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.tables.blocks import add_reference, find_sound
from kvstore.tiers.tables.object_rows import ObjectRow
from kvstore.tiers.tables.objects import find_object, object_rows, put_object
from kvstore.tiers.tables.records import Entry, position_key, unpack_entry
from kvstore.tiers.tables.streams import (
    StreamRow,
    append_entries,
    find_state,
    find_stream,
    read_entries,
    stream_ids,
)

KeyOf = Callable[[BlockKey | None, int, int], BlockKey | None]
"""(key of the block before, first token counted from the stream's end, number of tokens) -> the key of a block of these
tokens; None where there are not as many."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a stream may go on with.

    Args:
        entries: numbered to follow it.
        summaries: stored beside each.
        objects: that come along: all that describe no more, of a stream that was empty; else the state at their end,
            where there has to be one.
    """

    entries: list[Entry]
    summaries: list[bytes]
    objects: list[ObjectRow]


def find_continuation(view: ReadView, name: str, key_of: KeyOf, kind: str) -> Continuation:
    """Find the stream that holds most of what comes next. A key says all that came before: one is looked at in each.

    A stream or entry that is damaged, and a block that is not stored, end a run; they are no error.

    Args:
        view: the transaction.
        name: the stream that is to go on.
        key_of: see `KeyOf`.
        kind: of objects without which a stream cannot go on: where it or the other one has any, a run ends at one.

    Raises:
        StreamNotFoundError: there is none of that name.
        CorruptRecordError: the stream itself is damaged.
    """
    own = find_stream(view, name)
    state = find_state(view, own.stream_id)
    last = next(read_entries(view, own.stream_id, state.num_entries - 1), None) if state.num_entries else None
    best, source = list[Entry](), own
    has_states = bool(object_rows(view, own.stream_id, kind))
    for other in _alike(view, own, max(state.num_entries - 1, 0), last, key_of):
        run = list(_run(view, other, state.num_entries, last, key_of))
        if (states := object_rows(view, other.stream_id, kind)) or has_states:
            run = _until_state(view, run, states)
        if sum(entry.num_tokens for entry in run) > sum(entry.num_tokens for entry in best):
            best, source = run, other
    keys = [position_key(source.stream_id, entry.index) for entry in best]
    entries, first = [], state.num_tokens
    for entry in best:
        entries.append(replace(entry, first_token=first))
        first += entry.num_tokens
    end = state.num_entries + len(best)
    objects = [
        row
        for row in object_rows(view, source.stream_id)
        if row.num_blocks <= end and (state.num_entries == 0 or (row.kind == kind and row.num_blocks == end))
    ]
    return Continuation(entries, [view.get(Table.SUMMARIES, key) or b"" for key in keys], objects)


def continue_stream(view: WriteView, name: str, found: Continuation) -> None:
    """Append what was found; its blocks and objects have one reference more each, and the cursor stays.

    A stream that was empty is a fork then, and has the objects of its blocks, too; another one has objects of its own.

    Raises:
        StreamNotFoundError, CorruptRecordError: see `append_entries`.
    """
    stream_id = find_stream(view, name).stream_id
    state = find_state(view, stream_id)
    append_entries(view, stream_id, found.entries, found.summaries, state.cursor_json)
    for row in found.objects:
        if find_sound(view, row.body) is not None and find_object(view, stream_id, row.kind, row.index) is None:
            add_reference(view, row.body)
            put_object(view, stream_id, state.num_entries + len(found.entries), row)


def _alike(view: ReadView, own: StreamRow, index: int, last: Entry | None, key_of: KeyOf) -> Iterator[StreamRow]:
    """Other streams whose entry `index` is `last`, or where there is none, has the key of what comes next."""
    names = {position_key(stream_id, index): name for name, stream_id in stream_ids(view)}
    for place, packed in view.get_many(Table.ENTRIES, names).items():
        with suppress(KVStoreError):
            entry = unpack_entry(index, packed)
            if entry.key == (last.key if last is not None else key_of(None, 0, entry.num_tokens)):
                other = find_stream(view, names[place])
                if other.stream_id != own.stream_id and other.header.block_tokens == own.header.block_tokens:
                    yield other


def _run(view: ReadView, stream: StreamRow, first_entry: int, last: Entry | None, key_of: KeyOf) -> Iterator[Entry]:
    """Entries of a stream that continue `last`, as long as `key_of` names their blocks so and they are stored."""
    entries = _sound(view, stream, first_entry)
    parent, token = last.key if last is not None else None, 0
    for index, entry in enumerate(entries, start=first_entry):
        is_whole = entry.index == index and 1 <= entry.num_tokens <= stream.header.block_tokens
        if not is_whole or key_of(parent, token, entry.num_tokens) != entry.key or find_sound(view, entry.key) is None:
            return
        yield entry
        parent, token = entry.key, token + entry.num_tokens


def _until_state(view: ReadView, run: list[Entry], states: list[ObjectRow]) -> list[Entry]:
    """The run up to the last entry that a state stands behind; nothing where there is none."""
    places = {row.num_blocks for row in states if find_sound(view, row.body) is not None}
    count = next((count for count in range(len(run), 0, -1) if run[count - 1].index + 1 in places), 0)
    return run[:count]


def _sound(view: ReadView, stream: StreamRow, first: int) -> Iterator[Entry]:
    with suppress(KVStoreError):
        yield from read_entries(view, stream.stream_id, first)
