# SPDX-License-Identifier: Apache-2.0
"""Objects of streams: the calls of a store that put, list, read and drop them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext

from kvstore.native import IoPool
from kvstore.tiers.data_path import DataPath
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.moving.block_calls import BlockCalls
from kvstore.tiers.reading.object_reader import ObjectReader
from kvstore.tiers.tables.object_body import NewObject, ObjectEntry, check_kind, pack_object
from kvstore.tiers.tables.objects import drop_objects
from kvstore.tiers.tables.streams import find_stream_id


class ObjectCalls(BlockCalls):
    """Opaque bytes that belong to streams, such as pieces of an index. Thread-safe.

    Args:
        disk: the open folder.
        pool: moves extents.
        data: what moves blocks; None for a store opened without a layout.
    """

    def __init__(self, disk: DiskTier, pool: IoPool, data: DataPath | None) -> None:
        super().__init__(disk, data)
        self._pool = pool
        self._making = threading.Lock()
        self._reader: ObjectReader | None = None

    def put_objects(self, name: str, objects: Sequence[NewObject], *, may_drop: bool = False) -> None:
        """Store objects beside a stream, behind the caller's back and behind what was appended to it before.

        The objects of one call become visible together; each takes the place of one of the same kind and index. A kill
        leaves the old one or the new one. `flush` makes sure of them; durability `sync` needs none. Parts given as
        `bytes` are not copied; the call waits while more than 64 MiB of other objects wait to be written.

        Args:
            name: the stream.
            objects: what to store; each is written whole, and is one extent.
            may_drop: they can be made again: where there is no room for them they are left out, and the log says so,
                instead of failing what is appended next.

        Raises:
            ConfigError: an object is out of range, or describes more blocks than were appended to the stream.
            StreamNotFoundError: there is none of that name.
            KVStoreError: what an earlier append ran into; see `append`.
        """
        appender = self._writing().appender
        appender.put_objects(name, [pack_object(each) for each in objects], may_drop=may_drop)

    def objects(self, name: str, kind: str) -> list[ObjectEntry]:
        """List the objects of a kind that are durable, by index; one that is damaged is not among them.

        Raises:
            StreamNotFoundError: there is no such stream.
            ConfigError: `kind` is none.
        """
        check_kind(kind)
        return self._object_reader().entries(name, kind)

    def read_object(self, name: str, kind: str, index: int, parts: Sequence[int] | None = None) -> list[bytes | None]:
        """Read parts of one object; see `read_objects`."""
        return self.read_objects(name, kind, [(index, parts)])[0]

    def read_objects(
        self, name: str, kind: str, wanted: Sequence[tuple[int, Sequence[int] | None]]
    ) -> list[list[bytes | None]]:
        """Read parts of objects in one batch: only their pages, neighbours together.

        Parts of one object are of one `put_objects`, whatever a writer does meanwhile.

        Args:
            name: the stream.
            kind: of the objects.
            wanted: index of each, and the parts to read, counted from 0; None for all.

        Returns:
            Per object its parts, in the order asked for; None for one that is damaged or gone. All parts of an object
            that is gone are `[]`.

        Raises:
            StreamNotFoundError: there is no such stream.
            ConfigError: `kind` is none, or an index or a part is negative.
        """
        return self._object_reader().read(name, kind, wanted)

    def drop_objects(self, name: str, kind: str) -> int:
        """Drop all objects of a kind, queued ones too, in one transaction; returns how many there were.

        Raises:
            StreamNotFoundError, ConfigError, KVStoreError: see `put_objects`.
        """
        self._check_open(writing=True)
        check_kind(kind)
        write = None if self._data is None else self._data.write
        with nullcontext() if write is None else write.appender.stopped(name):
            if write is not None:
                write.writer.flush()
            with self._disk.changing():
                num_dropped, gone = self._disk.catalogue.write(
                    lambda view: drop_objects(view, find_stream_id(view, name), kind)
                )
                self._disk.allocator.release(extent for _, extent in gone)
        return num_dropped

    def _close_objects(self) -> None:
        with self._making:
            if self._reader is not None:
                self._reader.close()

    def _object_reader(self) -> ObjectReader:
        self._check_open()
        with self._making:
            if self._reader is None:
                self._reader = ObjectReader(self._disk, self._pool)
            return self._reader
