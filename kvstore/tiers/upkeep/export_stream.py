# SPDX-License-Identifier: Apache-2.0
"""Export: one stream with all that it needs, into one file, record by record."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvstore.calibration import CALIBRATION_ID_NBYTES
from kvstore.errors import CapacityError, KVStoreError, StoreIOError
from kvstore.native import IoPool
from kvstore.record import probe
from kvstore.spec import BlockKey
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.extents import sync_folder
from kvstore.tiers.manifest import Manifest
from kvstore.tiers.room import FULL_ERRNOS, describe_full
from kvstore.tiers.tables.blocks import find_directory
from kvstore.tiers.tables.objects import object_rows
from kvstore.tiers.tables.records import StreamState, pack_entry, pack_state
from kvstore.tiers.tables.streams import find_state, find_stream, read_entries, read_manifest, read_summaries
from kvstore.tiers.upkeep.container import ContainerWriter, Kind
from kvstore.tiers.upkeep.object_chunks import write_objects
from kvstore.tiers.upkeep.transfer import RecordTransfer

BLOCK_PREFIX = struct.Struct("<32sI")
"""In front of a record: key, tokens."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote.

    Args:
        num_entries: entries of the manifest.
        num_blocks: distinct blocks.
        missing: blocks that the store holds no more, or damaged: the file has their entries and not their bytes.
        nbytes: length of the file.
        num_objects: objects of the stream.
    """

    num_entries: int
    num_blocks: int
    missing: list[BlockKey]
    nbytes: int
    num_objects: int


def export_stream(
    disk: DiskTier, pool: IoPool, name: str, path: Path, progress: Callable[[int, int], None] | None = None
) -> ExportReport:
    """Write what is durable of a stream to a file, which appears whole or not at all.

    Args:
        disk: the store.
        pool: moves the bytes.
        name: the stream.
        path: the file; replaced if it is there.
        progress: called with blocks done and blocks in all.

    Raises:
        StreamNotFoundError: there is none of that name.
        CorruptRecordError: its manifest is damaged.
        CapacityError, StoreIOError: the file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            num_entries, num_blocks, missing, num_objects = _write(disk, pool, name, file, progress)
            file.flush()
            os.fsync(file.fileno())
            nbytes = file.tell()
        part.replace(path)
        sync_folder(path.absolute().parent)
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            raise CapacityError(f"{path}: {describe_full(path.absolute().parent)}") from error
        raise StoreIOError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # it is gone when all went well
            part.unlink()
    return ExportReport(num_entries, num_blocks, missing, nbytes, num_objects)


def _write(
    disk: DiskTier,
    pool: IoPool,
    name: str,
    file: BinaryIO,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, int, list[BlockKey], int]:
    with disk.catalogue.read() as view:
        stream_id = find_stream(view, name).stream_id
        manifest = read_manifest(view, name)
        cursor_json = find_state(view, stream_id).cursor_json
        keys = list({entry.key: None for entry in manifest.entries})
        heads = [find_directory(view, key) for key in keys]
        objects = object_rows(view, stream_id)
    container = ContainerWriter(file, has_objects=bool(objects))
    container.write(Kind.HEADER, manifest.header.to_json())
    state = StreamState(len(manifest.entries), manifest.num_tokens, cursor_json)
    container.write(Kind.STATE, pack_state(state))
    _write_calibrations(disk, manifest, heads, container)
    missing: list[BlockKey] = []
    for done, (key, block) in enumerate(zip(keys, RecordTransfer(disk, pool).read(keys), strict=True), start=1):
        if block is None:
            missing.append(key)
        else:
            container.write(Kind.BLOCK, BLOCK_PREFIX.pack(key, block.num_tokens), block.record)
        if progress is not None:
            progress(done, len(keys))
    for entry in manifest.entries:
        with disk.catalogue.read() as view:
            # Of a stream that was cut meanwhile, and grew again, another entry is there: its summary is not ours.
            is_same = next(read_entries(view, stream_id, entry.index), None) == entry
            summary = read_summaries(view, stream_id, entry.index, 1).get(entry.index) if is_same else None
        container.write(Kind.ENTRY, pack_entry(entry), bytes([summary is not None]), summary or b"")
    container.end()
    num_objects = write_objects(RecordTransfer(disk, pool), objects, container) if objects else 0
    return len(manifest.entries), len(keys), missing, num_objects


def _write_calibrations(
    disk: DiskTier, manifest: Manifest, heads: list[bytes | None], container: ContainerWriter
) -> None:
    """Write the objects that the records name, and what is decided for the model."""
    decision = disk.calibrations.of_model(manifest.header.spec)
    needed = set() if decision is None else {decision.calibration}
    for head in heads:
        with suppress(KVStoreError):
            needed.add(probe(head or b"").calibration_id)
    for identity in sorted(needed - {bytes(CALIBRATION_ID_NBYTES)}):
        with suppress(KVStoreError):  # one that is gone is missed where its blocks are read
            found = disk.calibrations.find(identity)
            if found is not None:
                container.write(Kind.CALIBRATION, found.data)
    if decision is not None:
        container.write(Kind.DECISION, decision.to_json())
