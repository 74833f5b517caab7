# SPDX-License-Identifier: Apache-2.0
"""Takes a stream over from a server: everything is checked, then it appears, or grows, in one transaction."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.codec import Codec, Profile
from kvstore.errors import CapacityError, ConfigError, CorruptRecordError, ShapeError, StreamNotFoundError
from kvstore.remote.envelope import ENVELOPE_NBYTES
from kvstore.remote.server import RemoteServer
from kvstore.remote.sharing.messenger import Messenger
from kvstore.remote.sharing.pages import PAGE_ENTRIES, StreamHead, page_name, unpack_page
from kvstore.remote.sharing.push import Progress, ShareReport, page_of
from kvstore.store import Entry, Manifest, Outcome, Store, StreamHeader
from kvstore.tiers.upkeep.record_check import RecordCheck
from kvstore.tiers.upkeep.transfer import EncodedBlock

_BATCH_BLOCKS = 32
_BATCH_NBYTES = 8 << 20
_MAX_BLOCK_NBYTES = 512 << 20
"""As much as a value of Redis can take; a head that announces larger blocks is not believed."""


def find_remote_stream(server: RemoteServer, name: str) -> StreamHeader:
    """Fetch the header of a stream that was pushed.

    Raises:
        StreamNotFoundError: the server has none of that name.
        CorruptRecordError: what it has is damaged.
        StoreIOError: the server failed.
    """
    return _fetch_head(Messenger(server, None), server, name).header


def pull(store: Store, server: RemoteServer, name: str, progress: Progress | None = None) -> ShareReport:
    """Take over a stream, or what it has grown by since.

    Every record is checked and decoded before it is stored. Blocks are stored first, plain ones, and the entries in one
    transaction after the last of them: one that was broken off goes on where it stood. What is pulled answers bit for
    bit what the origin answers.

    Args:
        store: open for writing; needs no layout.
        server: where the stream was pushed.
        name: the stream.
        progress: told after each batch.

    Raises:
        StreamNotFoundError: the server has none of that name.
        ConfigError: the store's own stream of that name is another one, or has gone its own way.
        SpecMismatchError: the store was opened for another model.
        CorruptRecordError: something is missing or damaged on the server; what was sound is stored. Push it again.
        CapacityError: the store is full.
        StoreIOError: the server or the device failed; run it again.
    """
    messenger = Messenger(server, store.calibrations)
    head = _fetch_head(messenger, server, name)
    begun = store.sharing.begun(head.header)
    manifest = begun or Manifest(head.header, (), {}, 0)
    entries, summaries = _fetch_entries(store, messenger, head, manifest)
    report = ShareReport(max(head.num_entries, len(manifest.entries)))
    is_ahead = manifest.is_complete or len(manifest.entries) > head.num_entries
    if begun is not None and not entries and (is_ahead or manifest.cursor == head.cursor):
        return report
    for identity in head.calibrations:
        found = messenger.bring_calibration(identity, head.header.spec)
        if found is not None:
            store.calibrations.hold(found)
    _pull_blocks(store, messenger, head.header, entries, report, progress)
    if head.decision is not None:
        calibration = messenger.bring_calibration(head.decision.calibration, head.header.spec)
        if calibration is not None:
            store.calibrations.keep(head.header.spec, calibration, head.decision, replace=False)
    store.sharing.adopt(head.header, entries, summaries, head.cursor)
    return report


def _fetch_head(messenger: Messenger, server: RemoteServer, name: str) -> StreamHead:
    data = messenger.fetch_head(name)
    if data is None:
        raise StreamNotFoundError(f"{server.place}: nobody has pushed a stream {name!r}")
    return StreamHead.from_json(name, data)


def _fetch_entries(
    store: Store, messenger: Messenger, head: StreamHead, manifest: Manifest
) -> tuple[list[Entry], list[bytes]]:
    """Fetch what the local stream lacks; what it has must be the same."""
    num_known = len(manifest.entries)
    entries: list[Entry] = []
    summaries: list[bytes] = []
    name = head.header.name
    for number, wanted_name in enumerate(head.pages):
        first = number * PAGE_ENTRIES
        if first + PAGE_ENTRIES <= num_known and page_name(page_of(store, manifest, first)) == wanted_name:
            continue
        data = messenger.fetch_page(wanted_name)
        if data is None or page_name(data) != wanted_name:
            raise CorruptRecordError(f"remote stream {name!r}: page {number} is missing or damaged; push it again")
        of_page, summaries_of_page = unpack_page(data, first)
        if len(of_page) != min(PAGE_ENTRIES, head.num_entries - first):
            raise CorruptRecordError(f"remote stream {name!r}: page {number} holds {len(of_page)} entries")
        for entry, summary in zip(of_page, summaries_of_page, strict=True):
            if entry.index < num_known:
                if entry != manifest.entries[entry.index]:
                    raise ConfigError(f"stream {name!r} here has gone its own way from entry {entry.index} on")
            elif not 1 <= entry.num_tokens <= head.header.block_tokens:
                raise CorruptRecordError(f"remote stream {name!r}: entry {entry.index} of {entry.num_tokens} tokens")
            else:
                entries.append(entry)
                summaries.append(summary)
    num_tokens = manifest.num_tokens + sum(entry.num_tokens for entry in entries)
    if entries and num_tokens != head.num_tokens:
        raise CorruptRecordError(f"remote stream {name!r}: {num_tokens} tokens, {head.num_tokens} announced")
    return entries, summaries


def _pull_blocks(
    store: Store,
    messenger: Messenger,
    header: StreamHeader,
    entries: Sequence[Entry],
    report: ShareReport,
    progress: Progress | None,
) -> None:
    wanted = {entry.key: entry for entry in entries}
    if any(wanted[entry.key].num_tokens != entry.num_tokens for entry in entries):
        raise CorruptRecordError(f"remote stream {header.name!r}: a block that is of two lengths")
    keys = list(wanted)
    report.num_blocks = len(keys)
    room_nbytes = _room_nbytes(header)
    step = max(1, min(_BATCH_BLOCKS, _BATCH_NBYTES // room_nbytes))
    checker = RecordCheck(store.calibrations, header)
    lost: list[Entry] = []
    for first in range(0, len(keys), step):
        batch = keys[first : first + step]
        some = [key for key, is_there in zip(batch, store.sharing.has_blocks(batch), strict=True) if not is_there]
        records = messenger.fetch_records(messenger.space(header.layout), some, room_nbytes) if some else []
        sound: list[EncodedBlock] = []
        for key, record in zip(some, records, strict=True):
            entry = wanted[key]
            if record is not None and checker.is_sound(record, entry.num_tokens):
                sound.append(EncodedBlock(key, entry.num_tokens, record))
            else:
                lost.append(entry)
        if Outcome.FULL in store.sharing.write(sound, wanted.keys()):
            raise CapacityError(f"stream {header.name!r}: no room for it; what has arrived stays until room is needed")
        report.num_moved += len(sound)
        report.nbytes += sum(len(block.record) for block in sound)
        if progress is not None:
            progress(min(first + step, len(keys)), len(keys))
    if lost:
        messenger.forget_records(messenger.space(header.layout), [entry.key for entry in lost])
        raise CorruptRecordError(
            f"remote stream {header.name!r}: {len(lost)} of {len(keys)} blocks are missing or damaged on the server, "
            f"the first at {lost[0].start_s:.1f} s; push it again, then pull"
        )


def _room_nbytes(header: StreamHeader) -> int:
    """Bytes that a record of the stream takes at most, with its envelope."""
    try:
        room_nbytes = ENVELOPE_NBYTES + Codec(header.layout, Profile.RAW).bound(header.block_tokens)
    except ShapeError as error:
        raise CorruptRecordError(f"remote stream {header.name!r}: {error}") from error
    if max(room_nbytes, header.layout.slot_nbytes) > _MAX_BLOCK_NBYTES:
        raise CorruptRecordError(f"remote stream {header.name!r}: blocks of {header.layout.slot_nbytes} bytes")
    return room_nbytes
