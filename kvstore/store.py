# SPDX-License-Identifier: Apache-2.0
"""The face of a store: streams of blocks and plain blocks, over host and disk, for one writer and many readers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from kvstore.codec import Profile
from kvstore.config import Access, Admission, Durability, Eviction, HostConfig, StoreConfig
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.native import IoPool
from kvstore.stats import StoreStats
from kvstore.tiers.base import Outcome, Tier
from kvstore.tiers.data_path import DataPath
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.manifest import JSON, Manifest, StreamHeader, check_spec
from kvstore.tiers.moving.backing import Backing
from kvstore.tiers.moving.fork_calls import ForkCalls
from kvstore.tiers.moving.object_calls import ObjectCalls
from kvstore.tiers.reading.request import FetchReport, FetchRequest
from kvstore.tiers.reading.verify import BlockFault, Verifier, VerifyReport
from kvstore.tiers.removal import remove_stream
from kvstore.tiers.slots import check_keys, check_layers, check_slots
from kvstore.tiers.tables.entries import Entries
from kvstore.tiers.tables.object_body import NewObject, ObjectEntry
from kvstore.tiers.tables.records import Entry
from kvstore.tiers.tables.streams import ensure_stream, find_stream, read_summaries, stream_rows
from kvstore.tiers.tables.take_manifest import take_manifest
from kvstore.tiers.upkeep.sharing import Sharing
from kvstore.tiers.usage import collect_stats
from kvstore.tiers.writing.appender import NewBlock

__all__ = [
    "Access",
    "BlockFault",
    "Durability",
    "Entries",
    "Entry",
    "FetchReport",
    "FetchRequest",
    "JSON",
    "Manifest",
    "NewBlock",
    "NewObject",
    "ObjectEntry",
    "Outcome",
    "Profile",
    "Store",
    "StreamHeader",
    "Tier",
    "VerifyReport",
    "check_spec",
]


class Store(ForkCalls, ObjectCalls):
    """One open store folder; make it with `Store.open`, close it with `with`. Thread-safe.

    One process writes, any number read beside it what it has committed; changing calls raise `ReadOnlyError`
    for them. A process opens a store once and shares the object; a forked child opens its own.

    Args:
        disk: the open folder.
        pool: moves extents.
        data: what moves blocks; None for a store opened without a layout.
    """

    def __init__(self, disk: DiskTier, pool: IoPool, data: DataPath | None) -> None:
        super().__init__(disk, pool, data)
        self.calibrations = disk.calibrations  # of models' keys and values: what lossy profiles code with

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        access: Access,
        layout: BlockLayout | None = None,
        profile: Profile = Profile.LOSSLESS,
        host_nbytes: int = 1 << 30,
        disk_nbytes: int | None = None,
        durability: Durability = Durability.COMMIT,
        io_threads: int = 4,
        decode_threads: int = 2,
        eviction: str = Eviction.LRU,
        admission: str = Admission.ALWAYS,
        stream_nbytes: int | None = None,
        remote: Backing | None = None,
        put_admission: str = Admission.ALWAYS,
        extent_folders: Sequence[str | os.PathLike[str]] = (),
    ) -> Store:
        """Open a store; a writer creates it where there is none.

        Args:
            path: the store's folder.
            access: reader or the one writer.
            layout: layout of the blocks that will be moved; None for listing, verifying and removing only.
            profile: how new blocks are coded.
            host_nbytes: memory of the host tier, at least two slots.
            disk_nbytes: most bytes on disk, catalogue included; None means as much as the disk holds.
            durability: what an acknowledged write survives.
            io_threads: native threads that read and write.
            decode_threads: threads that encode and decode.
            eviction: who leaves the host tier when it is full: `lru`, `s3-fifo`, `lfu` or `participation`.
            admission: which blocks that were read stay in it: `always`, or from the `second-use` on.
            stream_nbytes: most bytes of one stream's blocks in it, at least two slots; None for no limit.
            remote: a tier behind the disk (docs/remote.md), of the same layout: blocks that are missing or damaged here
                are looked for there, and written ones are offered to it. The caller closes it, after the store.
            put_admission: which plain blocks are written to disk: `always`, or from the `second-use` on.
            extent_folders: on other drives, remembered: new extents go to them too; one that is away is misses.

        Raises:
            StoreNotFoundError: a reader found nothing there.
            BusyError, ReadOnlyError: another process writes it, this one has it open, or a writer may not write there.
            UnsupportedFormatError, CorruptRecordError: it is newer than this program; its catalogue is damaged.
            ConfigError: a setting is out of range.
        """
        host = HostConfig.named(eviction, admission, stream_nbytes, put_admission)
        folders = tuple(map(Path, extent_folders))
        config = StoreConfig(access, durability, host_nbytes, disk_nbytes, io_threads, decode_threads, host, folders)
        with ExitStack() as building:
            disk = DiskTier(Path(path), config)
            building.callback(disk.close)
            pool = IoPool(io_threads)
            building.callback(pool.close)
            data = None if layout is None else DataPath(disk, pool, layout, profile, remote)
            building.pop_all()
        return Store(disk, pool, data)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is queued, then close; raises what the last writes hit. A second call does nothing."""
        if not self._is_open or os.getpid() != self._pid:
            return
        self._is_open = False
        with ExitStack() as cleanup:
            cleanup.callback(self._disk.close)
            cleanup.callback(self._pool.close)
            cleanup.callback(self._close_objects)
            if self._data is not None:
                cleanup.callback(self._data.close)

    def create_stream(self, header: StreamHeader) -> Manifest:
        """Create a stream, or resume one: a stream with an equal header, but for the time, is returned as it stands.

        Raises:
            ConfigError: the name exists with another header, or the profile is not the store's.
            SpecMismatchError: the spec or block size is not the store's.
        """
        self._check_open(writing=True)
        if self._data is not None:
            self._data.check_header(header)
        with self._disk.mutation:
            self._disk.catalogue.write(lambda view: ensure_stream(view, header))
        return self.manifest(header.name)

    def manifest(self, name: str, known: Manifest | None = None) -> Manifest:
        """Take a snapshot of what is durable of a stream; raises `StreamNotFoundError`.

        Args:
            name: the stream.
            known: an earlier snapshot: of a stream that has only grown since, only what is new is read.
        """
        self._check_open()
        return take_manifest(self._disk.catalogue, name, known)

    def header(self, name: str) -> StreamHeader:
        """What is fixed about a stream, without a look at what grows; raises `StreamNotFoundError`."""
        self._check_open()
        with self._disk.catalogue.read() as view:
            return find_stream(view, name).header

    def streams(self) -> list[StreamHeader]:
        """List all streams by name."""
        self._check_open()
        with self._disk.catalogue.read() as view:
            return [row.header for row in stream_rows(view)]

    def append(self, name: str, blocks: Sequence[NewBlock], cursor: Mapping[str, JSON]) -> None:
        """Append blocks to a stream and move its cursor, behind the caller's back.

        Slots are copied before the call returns; it waits while the host tier is full of unwritten blocks. The blocks
        of one call and its cursor become visible together. `flush` makes sure of them; durability `sync` needs none.

        Args:
            name: the stream.
            blocks: the next blocks, in order; may be empty to move the cursor only.
            cursor: where the producer stands after these blocks; `is_complete: true` marks the end.

        Raises:
            KVStoreError: what an earlier append ran into (CapacityError, StoreIOError, ...); what followed the last
                flush may be lost: continue from `manifest(name).cursor`.
            ConfigError: the entries do not continue the stream.
            ShapeError: a slot or a number does not fit.
            SpecMismatchError: the stream holds another model's KV.
            StreamNotFoundError: create it first.
        """
        self._writing().appender.append(name, blocks, cursor)

    def flush(self) -> None:
        """Wait until everything appended is durable; raises what the writer ran into, like `append`."""
        self._writing().writer.flush()

    def fetch(self, requests: Sequence[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        """Bring blocks into their slots, in one batch: neighbours on disk are read together, decoding overlaps I/O.

        Blocks read whole stay in the host tier. A fault concerns its item only: it ends as `MISS`, `DAMAGED`, or
        `UNAVAILABLE` when the device is at fault. A block that another batch is reading is waited for, not read again.

        Args:
            requests: the blocks.
            timeout_s: seconds after which those that have not come end as `TIMED_OUT`; see `get`.

        Raises:
            ShapeError: a slot or a layer range does not fit.
            ConfigError: the store was opened without a layout.
        """
        data = self._moving()
        check_keys(request.key for request in requests)
        check_slots((request.slot for request in requests), data.layout)
        for request in requests:
            if request.layers is not None:
                check_layers(request.layers, data.layout)
        return data.fetcher.fetch(requests) if timeout_s is None else data.mover.fetch(requests, timeout_s)

    def summaries(self, name: str, first: int, count: int) -> dict[int, bytes]:
        """Return summaries of entries `first` to `first + count` by index, those there are; raises like `manifest`."""
        self._check_open()
        if first < 0 or count < 0:
            raise ConfigError(f"summaries: first {first}, count {count}; neither can be negative")
        with self._disk.catalogue.read() as view:
            return read_summaries(view, find_stream(view, name).stream_id, first, count)

    def remove_stream(self, name: str) -> int:
        """Remove a stream and the blocks that only it needs, in one transaction; returns the bytes freed.

        Raises:
            StreamNotFoundError, KVStoreError: there is none of that name; what an earlier append ran into.
        """
        self._check_open(writing=True)
        return remove_stream(self._disk, self._data, name)

    @property
    def sharing(self) -> Sharing:
        """Records as they are, for giving streams to other stores and taking them over."""
        self._check_open()
        return Sharing(self._disk, self._pool, self._data)

    def verify(self, name: str | None = None, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read, check and decode the blocks of one stream, or of the whole store and then its tables, too.

        Args:
            name: a stream, or `StreamNotFoundError`; None for everything.
            progress: called with blocks done and blocks in all.
        """
        self._check_open()
        verifier = Verifier(self._disk, self._pool, progress)
        return verifier.everything() if name is None else verifier.stream(name)

    def stats(self) -> StoreStats:
        """Count what each tier moved, held, found and missed since the store was opened."""
        self._check_open()
        return collect_stats(self._disk, self._data)
