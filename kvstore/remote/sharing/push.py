# SPDX-License-Identifier: Apache-2.0
"""Gives a stream to a server: records as they are, then the pages of its manifest, its head last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvstore.errors import CapacityError, CorruptRecordError
from kvstore.remote.server import RemoteServer
from kvstore.remote.sharing.messenger import Messenger
from kvstore.remote.sharing.pages import PAGE_ENTRIES, StreamHead, pack_page, page_name
from kvstore.spec import BlockKey
from kvstore.store import Manifest, Store
from kvstore.tiers.base import Outcome

_BATCH_BLOCKS = 32
_BATCH_NBYTES = 8 << 20

Progress = Callable[[int, int], None]
"""Called with blocks done and blocks in all."""


@dataclass(slots=True)
class ShareReport:
    """What a push or a pull did.

    Args:
        num_entries: of the stream, now that it is there.
        num_blocks: distinct blocks that were looked at.
        num_moved: those that were not there yet.
        nbytes: of their records.
    """

    num_entries: int
    num_blocks: int = 0
    num_moved: int = 0
    nbytes: int = 0


def push(store: Store, server: RemoteServer, name: str, progress: Progress | None = None) -> ShareReport:
    """Give a stream, as it stands, to a server; pullers see it whole or as it was.

    What the server has is not sent again, so one that was broken off goes on, and a stream that has grown sends what is
    new.

    Args:
        store: open for reading or writing; needs no layout.
        server: where it goes.
        name: the stream.
        progress: told after each batch.

    Raises:
        StreamNotFoundError: the store has none of that name.
        CorruptRecordError: a block of it is missing or damaged here.
        CapacityError: the server is full; what was sent stays.
        StoreIOError: the server failed; run it again.
    """
    manifest = store.manifest(name)
    messenger = Messenger(server, store.calibrations)
    keys = list({entry.key: None for entry in manifest.entries})
    report = ShareReport(len(manifest.entries), len(keys))
    needed: dict[bytes, None] = {}
    for first in range(0, len(keys), _BATCH_BLOCKS):
        some = keys[first : first + _BATCH_BLOCKS]
        for identity in store.sharing.calibrations_of(some):
            if identity not in needed:
                messenger.send_calibration(identity)
                needed[identity] = None
        _push_blocks(store, manifest, messenger, some, report)
        if progress is not None:
            progress(first + len(some), len(keys))
    pages = _push_pages(store, manifest, messenger)
    decision = store.calibrations.of_model(manifest.header.spec)
    if decision is not None:
        messenger.send_calibration(decision.calibration)
        needed[decision.calibration] = None
    head = StreamHead(
        manifest.header, len(manifest.entries), manifest.num_tokens, manifest.cursor, pages, list(needed), decision
    )
    messenger.send_head(name, head.to_json())
    return report


def _push_blocks(
    store: Store, manifest: Manifest, messenger: Messenger, keys: Sequence[BlockKey], report: ShareReport
) -> None:
    space = messenger.space(manifest.header.layout)
    for batch in _batches(store, manifest, messenger.missing(space, keys)):
        if Outcome.FULL in messenger.send_records(space, batch):
            raise CapacityError("the remote tier is full; remove something there, or give it more memory")
        report.num_moved += len(batch)
        report.nbytes += sum(len(record) for _, record in batch)


def _batches(store: Store, manifest: Manifest, keys: Sequence[BlockKey]) -> Iterator[list[tuple[BlockKey, bytes]]]:
    """Read records, as many at a time as are sent together."""
    batch: list[tuple[BlockKey, bytes]] = []
    nbytes = 0
    for key, block in zip(keys, store.sharing.read(keys), strict=True):
        if block is None:
            entry = next(entry for entry in manifest.entries if entry.key == key)
            raise CorruptRecordError(
                f"stream {manifest.header.name!r}: block {entry.index}, {entry.start_s:.1f} to {entry.end_s:.1f} s, "
                "is missing or damaged; `kvstore verify` says more"
            )
        if batch and nbytes + len(block.record) > _BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append((key, block.record))
        nbytes += len(block.record)
    if batch:
        yield batch


def _push_pages(store: Store, manifest: Manifest, messenger: Messenger) -> list[bytes]:
    names: list[bytes] = []
    for first in range(0, len(manifest.entries), PAGE_ENTRIES):
        data = page_of(store, manifest, first)
        names.append(page_name(data))
        messenger.send_page(names[-1], data)
    return names


def page_of(store: Store, manifest: Manifest, first: int) -> bytes:
    """Pack the page of a stored stream that begins with entry `first`."""
    entries = manifest.entries[first : first + PAGE_ENTRIES]
    summaries = store.summaries(manifest.header.name, first, len(entries))
    return pack_page(entries, [summaries.get(entry.index, b"") for entry in entries])
