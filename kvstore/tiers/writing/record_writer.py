# SPDX-License-Identifier: Apache-2.0
"""Turns blocks into records in extents: several threads encode and write, each a part of the batch. Commits nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import accumulate
from queue import SimpleQueue

from kvstore.errors import CapacityError
from kvstore.layout import round_up
from kvstore.native import Arena, IoPool
from kvstore.spec import BlockKey
from kvstore.stats import TierStats
from kvstore.tiers.base import Extent
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.moving.backing import Backing
from kvstore.tiers.tables.blocks import PlacedBlock
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, BlockRecord, extent_nbytes
from kvstore.tiers.writing.packing import NewRecord, PackedRecord, pack

# A part costs some 60 us of Python; the device is as fast with 1 MiB at a time as with more, and waits for the first.
_LEAST_PART_NBYTES = 256 << 10
_MOST_PART_NBYTES = 1 << 20
_PARTS = 4
_HUGE_PAGE_NBYTES = 2 << 20
"""Writes from huge pages are some long segments to the device, not hundreds of pages."""


@dataclass(slots=True)
class _Batch:
    """What becomes of the parts of one batch, which are placed in order; guarded by `changed`.

    Args:
        keep: blocks that must not be evicted.
        num_placed: parts that have been placed, or will not be.
        placed: blocks that have a place.
        full: why the others have none.
        error: what ended a part before it was placed.
    """

    keep: Collection[BlockKey]
    num_placed: int = 0
    placed: list[PlacedBlock] = field(default_factory=list)
    full: CapacityError | None = None
    error: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)


class RecordWriter:
    """Owns threads and staging memory of writes; used by one thread at a time, for one batch at a time.

    A batch begins with `write`, and ends with `finish`, after which it may be committed, or with `discard`.

    A thread encodes a part of the batch, finds places for it, and waits until it is written: while it does, the others
    have the processor. So bytes go to the device as soon as there are some, without another thread being woken.

    Args:
        disk: where extents come from.
        codecs: make the records.
        block_tokens: most tokens of a block.
        pool: moves the bytes.
        num_threads: parts that are on their way at once.
        backing: is offered every record.
    """

    def __init__(
        self,
        disk: DiskTier,
        codecs: CodecShelf,
        block_tokens: int,
        pool: IoPool,
        num_threads: int,
        backing: Backing | None = None,
    ) -> None:
        self._disk = disk
        self._codecs = codecs
        self._pool = pool
        self._backing = backing
        self._region_nbytes = extent_nbytes(codecs.bound(block_tokens))
        room_nbytes = round_up(max(self._region_nbytes, _MOST_PART_NBYTES), _HUGE_PAGE_NBYTES)
        self._arena = Arena(num_threads * room_nbytes, False)
        self._memory = memoryview(self._arena)
        self._rooms: SimpleQueue[int] = SimpleQueue()
        for number in range(num_threads):
            self._rooms.put(number * room_nbytes)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kvstore-records")
        self._jobs: list[Future[None]] = []
        self._unsynced: set[int] = set()

    def write(
        self, blocks: Sequence[NewRecord], keep: Collection[BlockKey]
    ) -> tuple[list[PlacedBlock], CapacityError | None]:
        """Begin to write blocks to extents; their slots are the caller's again on return.

        Args:
            blocks: distinct keys.
            keep: blocks that must not be evicted to make room.

        Returns:
            What is being written, in order, and why it is not all: the disk or the budget is full.

        Raises:
            KVStoreError: a block cannot be encoded, or no place be found for it; nothing is kept.
        """
        part_nbytes = len(blocks) * self._region_nbytes // _PARTS
        part_nbytes = max(_LEAST_PART_NBYTES, min(part_nbytes, _MOST_PART_NBYTES))
        step = max(1, part_nbytes // self._region_nbytes)
        parts = [blocks[start : start + step] for start in range(0, len(blocks), step)]
        batch = _Batch(keep)
        self._unsynced.clear()
        self._jobs = [
            self._threads.submit(self._write_part, index, part, self._disk.next_numbers(len(part)), batch)
            for index, part in enumerate(parts)
        ]
        with batch.changed:
            batch.changed.wait_for(lambda: batch.num_placed == len(parts))
        if batch.error is not None:
            self.discard(batch.placed)
            raise batch.error
        return batch.placed, batch.full

    def finish(self) -> None:
        """Return when what was begun is written, and synced unless durability is `none`; may be called again.

        Raises:
            StoreIOError: the device failed; discard what was begun. Likewise the others.
            CapacityError: the file system filled up while it was written to.
        """
        for job in self._jobs:
            job.result()
        began_s = time.perf_counter()
        if self._unsynced and self._disk.config.durability.survives_power_cut:
            self._disk.files.sync(self._unsynced)
        self._unsynced.clear()
        self._disk.meter.add(TierStats(write_s=time.perf_counter() - began_s))

    def discard(self, placed: Sequence[PlacedBlock]) -> None:
        """Give up what will not be committed."""
        wait(self._jobs)  # the extents are in use until the last write has ended, well or badly
        self._disk.allocator.release(each.record.extent for each in placed)

    def close(self) -> None:
        """End the threads, give the staging memory back."""
        self._threads.shutdown()
        self._memory.release()
        del self._arena

    def _write_part(self, index: int, blocks: Sequence[NewRecord], generations: Sequence[int], batch: _Batch) -> None:
        at = self._rooms.get()
        try:
            packed: list[PackedRecord] = []
            error: BaseException | None = None
            began_s = time.perf_counter()
            try:
                packed = self._encode(blocks, generations, at)
            except BaseException as caught:  # noqa: BLE001 - the batch's, whatever it is
                error = caught
            encoded_s = time.perf_counter()
            extents = self._place(index, blocks[: len(packed)], packed, error, batch)
            for file_id, ops in transfers(extents, at).items():
                self._pool.write(self._disk.files.file(file_id), self._arena, ops)
            nbytes = sum(extent.nbytes for extent in extents)
            counts = TierStats(
                written_blocks=len(extents),
                written_nbytes=nbytes,
                encode_s=encoded_s - began_s,
                write_s=time.perf_counter() - encoded_s,
            )
            self._disk.meter.add(counts)
        finally:
            self._rooms.put(at)

    def _encode(self, blocks: Sequence[NewRecord], generations: Sequence[int], at: int) -> list[PackedRecord]:
        out = self._memory[at : at + len(blocks) * self._region_nbytes]
        packed = pack(self._codecs.encoder(), self._codecs.profile, blocks, generations, out)
        if self._backing is not None:
            for block, each in zip(blocks, packed, strict=True):
                self._backing.offer(block.key, out[EXTENT_HEADER_NBYTES : EXTENT_HEADER_NBYTES + each.nbytes])
                out = out[extent_nbytes(each.nbytes) :]
        return packed

    def _place(
        self,
        index: int,
        blocks: Sequence[NewRecord],
        packed: Sequence[PackedRecord],
        error: BaseException | None,
        batch: _Batch,
    ) -> list[Extent]:
        """Find places when those before have theirs; nothing has one any more once one has found none."""
        with batch.changed:
            batch.changed.wait_for(lambda: batch.num_placed == index)
            batch.error = batch.error or error
            extents: list[Extent] = []
            try:
                if batch.full is None and batch.error is None:
                    extents, batch.full = self._disk.allocate(
                        [extent_nbytes(each.nbytes) for each in packed], batch.keep
                    )
            except BaseException as caught:  # noqa: BLE001 - likewise
                batch.error = caught
            for block, each, extent in zip(blocks, packed, extents, strict=False):
                number = each.generation
                record = BlockRecord(block.num_tokens, extent, each.nbytes, number, references=0, stamp=number)
                batch.placed.append(PlacedBlock(block.key, record, each.directory))
            self._unsynced.update(extent.file_id for extent in extents)
            batch.num_placed += 1
            batch.changed.notify_all()
            return extents


def transfers(extents: Sequence[Extent], at: int) -> dict[int, list[tuple[int, int, int]]]:
    """What to write where, by file, of extents that lie one behind the other in memory from `at` on.

    Returns:
        Operations of `IoPool.submit_write`; neighbours in a file are one.
    """
    by_file: dict[int, list[tuple[int, int, int]]] = {}
    starts = accumulate((extent.nbytes for extent in extents), initial=at)
    for extent, start in zip(extents, starts, strict=False):
        ops = by_file.setdefault(extent.file_id, [])
        offset, first, nbytes = ops[-1] if ops else (-1, -1, 0)
        if (offset + nbytes, first + nbytes) == (extent.offset, start):
            ops[-1] = (offset, first, nbytes + extent.nbytes)
        else:
            ops.append((extent.offset, start, extent.nbytes))
    return by_file
