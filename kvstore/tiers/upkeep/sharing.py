# SPDX-License-Identifier: Apache-2.0
"""What it takes to give a stream to another store, or to take one over: records as they are, then their entries."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext

from kvstore.errors import ConfigError, CorruptRecordError, KVStoreError, ReadOnlyError, StreamNotFoundError
from kvstore.native import IoPool
from kvstore.record import probe
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.catalogue import WriteView
from kvstore.tiers.data_path import DataPath
from kvstore.tiers.disk import DiskTier, Found
from kvstore.tiers.manifest import JSON, Manifest, StreamHeader, dump_json
from kvstore.tiers.tables.blocks import find_sound
from kvstore.tiers.tables.records import Entry
from kvstore.tiers.tables.streams import append_entries, ensure_stream, find_state, find_stream, read_manifest
from kvstore.tiers.upkeep.transfer import EncodedBlock, RecordTransfer


class Sharing:
    """Records and entries of one open store. Thread-safe.

    Args:
        disk: the store.
        pool: moves the bytes.
        data: of a store opened with a layout.
    """

    def __init__(self, disk: DiskTier, pool: IoPool, data: DataPath | None) -> None:
        self._disk = disk
        self._data = data
        self._transfer = RecordTransfer(disk, pool)

    def read(self, keys: Sequence[BlockKey]) -> Iterator[EncodedBlock | None]:
        """See `RecordTransfer.read`."""
        return self._transfer.read(keys)

    def write(self, blocks: Sequence[EncodedBlock], keep: Collection[BlockKey]) -> list[Outcome]:
        """See `RecordTransfer.write`."""
        return self._transfer.write(blocks, keep)

    def has_blocks(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Say per block whether the disk tier holds it: unlike `Store.exists`, what only memory holds is not there."""
        with self._disk.catalogue.read() as view:
            return [find_sound(view, key) is not None for key in keys]

    def begun(self, header: StreamHeader) -> Manifest | None:
        """Return what there is of a stream that is to be taken over, appended blocks too; None before `adopt` makes it.

        Raises:
            ConfigError: there is another stream of that name, or the store was opened for another profile.
            SpecMismatchError: the store was opened for another model or block size.
            ReadOnlyError: the store is open for reading.
            KVStoreError: what an earlier append ran into.
        """
        if not self._disk.is_writable:
            raise ReadOnlyError(f"{self._disk.folder}: open for reading; open it with Access.WRITE")
        if self._data is not None:
            self._data.check_header(header)
        if self._data is not None and self._data.write is not None:
            self._data.write.writer.flush()
        with self._disk.catalogue.read() as view:
            try:
                manifest = read_manifest(view, header.name)
            except StreamNotFoundError:
                return None
        if not manifest.header.describes_same(header):
            raise ConfigError(f"stream {header.name!r} exists and was made otherwise; remove it or use another name")
        return manifest

    def calibrations_of(self, keys: Sequence[BlockKey]) -> list[bytes]:
        """Ids of the calibrations that stored blocks name, each once; a block that is not stored names none.

        Raises:
            CorruptRecordError: a block's entry or directory is damaged.
        """
        found: dict[bytes, None] = {}
        for each in self._disk.look_up(keys, [True] * len(keys)):
            if isinstance(each, KVStoreError):
                raise CorruptRecordError(f"{self._disk.folder}: {each}") from each
            if isinstance(each, Found):
                identity = probe(each.directory or b"").calibration_id
                if any(identity):
                    found[identity] = None
        return list(found)

    def adopt(
        self, header: StreamHeader, entries: Sequence[Entry], summaries: Sequence[bytes], cursor: Mapping[str, JSON]
    ) -> None:
        """Append entries whose blocks are stored already, and move the cursor, in one durable transaction.

        A stream that is not there is made in it.

        Nobody may append to the stream meanwhile.

        Raises:
            ConfigError: the entries do not continue the stream, or there is another one of that name.
            CorruptRecordError: a block is not stored; nothing was changed.
            KVStoreError: what an earlier append ran into.
        """
        name, cursor_json = header.name, dump_json(dict(cursor), "cursor")
        write = None if self._data is None else self._data.write

        def append(view: WriteView) -> None:
            ensure_stream(view, header)
            stream_id = find_stream(view, name).stream_id
            num_entries = find_state(view, stream_id).num_entries
            if entries and entries[0].index != num_entries:
                raise ConfigError(f"stream {name!r}: entry {entries[0].index} adopted, it continues at {num_entries}")
            append_entries(view, stream_id, entries, summaries, cursor_json)

        with nullcontext() if write is None else write.appender.stopped(name):
            if write is not None:
                write.writer.flush()
            with self._disk.changing():
                self._disk.catalogue.write(append)
