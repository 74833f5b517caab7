# SPDX-License-Identifier: Apache-2.0
"""Objects to extents, and one transaction that names them: what the writer's thread does for `put_objects`."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from kvstore.errors import KVStoreError
from kvstore.native import Arena, IoPool, crc32c
from kvstore.spec import BLOCK_KEY_NBYTES, BlockKey
from kvstore.stats import TierStats
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import WriteView
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.tables.blocks import PlacedBlock, insert_blocks
from kvstore.tiers.tables.object_body import PackedObject
from kvstore.tiers.tables.object_rows import ObjectRow, first_of
from kvstore.tiers.tables.objects import put_object
from kvstore.tiers.tables.records import (
    EXTENT_HEADER_NBYTES,
    BlockRecord,
    ExtentHeader,
    extent_nbytes,
    pack_extent_header,
)
from kvstore.tiers.tables.streams import find_state
from kvstore.tiers.writing.jobs import ObjectJob

_MEMORY_NBYTES = 8 << 20


class ObjectWriter:
    """Writes and commits objects; used by the writer's thread, under `DiskTier.mutation`.

    Args:
        disk: where they go.
        pool: moves the bytes.
    """

    def __init__(self, disk: DiskTier, pool: IoPool) -> None:
        self._disk = disk
        self._pool = pool

    def store(self, jobs: Sequence[ObjectJob], keep: Collection[BlockKey]) -> None:
        """Write the bodies, then name all of them in one transaction.

        Args:
            jobs: what to store.
            keep: blocks that must not be evicted to make room.

        Raises:
            ConfigError, StreamNotFoundError: a stream is shorter than what an object of it describes, or gone.
            CapacityError, StoreIOError: no room, or the device failed. Nothing of it is stored, like after the others.
        """
        objects = [each for job in jobs for each in job.objects]
        if not objects:
            return
        extents, full = self._disk.allocate([extent_nbytes(each.body_nbytes) for each in objects], keep)
        is_committed = False
        try:
            if full is not None:
                raise full
            placed = self._write(objects, extents)

            def name(view: WriteView) -> list[Extent]:
                freed = insert_blocks(view, placed)
                bodies = iter(placed)
                for job in jobs:
                    num_entries = find_state(view, job.stream_id).num_entries
                    for each in job.objects:
                        row = ObjectRow(each.kind, each.index, each.num_blocks, next(bodies).key, first_of(each))
                        left = put_object(view, job.stream_id, num_entries, row)
                        freed += [] if left is None else [left]
                return freed

            self._disk.commit(name, keep)
            is_committed = True
        finally:
            if not is_committed:
                self._disk.allocator.release(extents)

    def _write(self, objects: Sequence[PackedObject], extents: Sequence[Extent]) -> list[PlacedBlock]:
        """Write bodies to their extents, synced on return unless durability is `none`."""
        began_s = time.perf_counter()
        placed: list[PlacedBlock] = []
        memory = _Memory(self._disk, self._pool, sum(extent.nbytes for extent in extents))
        for each, extent in zip(objects, extents, strict=True):
            number, nbytes = self._disk.next_number(), each.body_nbytes
            checksum = crc32c(each.first)
            for part in each.parts:
                checksum = crc32c(part, checksum)
            key = self._key(number, each)
            header = pack_extent_header(ExtentHeader(key, number, nbytes, checksum))
            padding = bytes(extent.nbytes - EXTENT_HEADER_NBYTES - nbytes)
            memory.write(extent, (header, each.first, *each.parts, padding))
            record = BlockRecord(0, extent, nbytes, number, references=1, stamp=number)
            placed.append(PlacedBlock(key, record, b""))
        memory.empty()
        if self._disk.config.durability.survives_power_cut:
            self._disk.files.sync({extent.file_id for extent in extents})
        written_nbytes = sum(extent.nbytes for extent in extents)
        self._disk.meter.add(TierStats(written_nbytes=written_nbytes, write_s=time.perf_counter() - began_s))
        return placed

    def _key(self, number: int, packed: PackedObject) -> BlockKey:
        """A key that no other body has, in this store or, with the parts' checksums, in a copy of it."""
        facts = self._disk.files.folders.store_id.encode() + number.to_bytes(8, "little") + packed.first
        return BlockKey(hashlib.blake2b(facts, digest_size=BLOCK_KEY_NBYTES, person=b"kvstore object").digest())


class _Memory:
    """Gathers what goes to extents, whole pages at a time; writes it when it is full."""

    def __init__(self, disk: DiskTier, pool: IoPool, nbytes: int) -> None:
        self._disk = disk
        self._pool = pool
        self._nbytes = min(nbytes, _MEMORY_NBYTES)
        self._arena = Arena(self._nbytes, False)
        self._at = 0
        self._ops: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)

    def write(self, extent: Extent, buffers: Iterable[bytes]) -> None:
        """Take the bytes of one extent."""
        begin, offset = self._at, extent.offset
        with memoryview(self._arena) as room:
            for buffer in buffers:
                rest = memoryview(buffer)
                while rest:
                    taken = min(len(rest), self._nbytes - self._at)
                    room[self._at : self._at + taken] = rest[:taken]
                    self._at, rest = self._at + taken, rest[taken:]
                    if self._at == self._nbytes:
                        self._ops[extent.file_id].append((offset, begin, self._at - begin))
                        offset += self._at - begin
                        self.empty()
                        begin = 0
        if self._at > begin:
            self._ops[extent.file_id].append((offset, begin, self._at - begin))

    def empty(self) -> None:
        """Return when everything taken is written, or raise when nothing is on its way any more."""
        opened = {file_id: self._disk.files.file(file_id) for file_id in self._ops}
        tickets = [self._pool.submit_write(opened[file_id], self._arena, ops) for file_id, ops in self._ops.items()]
        errors: list[KVStoreError] = []
        for ticket in tickets:
            try:
                ticket.wait()
            except KVStoreError as error:
                errors.append(error)
        self._ops.clear()
        self._at = 0
        if errors:
            raise errors[0]
