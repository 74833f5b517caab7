# SPDX-License-Identifier: Apache-2.0
"""Turns blocks into records in extents: encode in parallel, write while the next ones are encoded. Commits nothing."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate

from kvstore.errors import CapacityError, KVStoreError
from kvstore.layout import round_up
from kvstore.native import Arena, IoPool, Ticket
from kvstore.spec import BlockKey
from kvstore.stats import TierStats
from kvstore.tiers.base import Extent
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.moving.backing import Backing
from kvstore.tiers.tables.blocks import PlacedBlock
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, BlockRecord, extent_nbytes
from kvstore.tiers.writing.packing import NewRecord, PackedRecord, pack

# A part costs some 60 us of Python, and the device waits for the first one; it is as fast with 1 MiB at a time as with
# more.
_LEAST_PART_NBYTES = 256 << 10
_MOST_PART_NBYTES = 1 << 20
_PARTS = 4
_PARTS_IN_FLIGHT = 6
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
        is_over: nothing finds a place any more: the batch was given up, and a job may be left that nobody knows of, as
            an executor that finds no thread has queued it all the same.
    """

    keep: Collection[BlockKey]
    num_placed: int = 0
    placed: list[PlacedBlock] = field(default_factory=list)
    full: CapacityError | None = None
    error: BaseException | None = None
    is_over: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)


@dataclass(slots=True)
class _Part:
    """Blocks that are encoded and written together, in one room of the memory, which begins at `at`."""

    at: int
    tickets: list[Ticket] = field(default_factory=list)
    job: Future[TierStats] = field(default_factory=Future)


class RecordWriter:
    """Owns the staging memory of writes; used by one thread at a time, for one batch at a time.

    A batch begins with `write`, and ends with `finish`, after which it may be committed, or with `discard`.

    Whoever has encoded a part of the batch finds places for it and hands it to the device: another thread would have to
    be woken, and find no processor until all is encoded.

    Args:
        disk: where extents come from.
        codecs: make the records.
        block_tokens: most tokens of a block.
        pool: moves the bytes.
        encoders: threads that encode.
        num_encoders: how many they are.
        backing: is offered every record.
    """

    def __init__(
        self,
        disk: DiskTier,
        codecs: CodecShelf,
        block_tokens: int,
        pool: IoPool,
        encoders: Executor,
        num_encoders: int,
        backing: Backing | None = None,
    ) -> None:
        self._disk = disk
        self._codecs = codecs
        self._pool = pool
        self._backing = backing
        self._region_nbytes = extent_nbytes(codecs.bound(block_tokens))
        room_nbytes = round_up(max(self._region_nbytes, _MOST_PART_NBYTES), _HUGE_PAGE_NBYTES)
        num_rooms = num_encoders + _PARTS_IN_FLIGHT
        self._arena = Arena(num_rooms * room_nbytes, False)
        self._memory = memoryview(self._arena)
        self._rooms = [number * room_nbytes for number in range(num_rooms)]  # those that are free
        self._in_flight: deque[_Part] = deque()
        self._encoders = encoders
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
            KVStoreError: the device failed, a block cannot be encoded, or no place be found for it; nothing is kept.
        """
        part_nbytes = len(blocks) * self._region_nbytes // _PARTS
        part_nbytes = max(_LEAST_PART_NBYTES, min(part_nbytes, _MOST_PART_NBYTES))
        step = max(1, part_nbytes // self._region_nbytes)
        parts = [blocks[start : start + step] for start in range(0, len(blocks), step)]
        batch = _Batch(keep)
        self._unsynced.clear()
        is_kept = False
        try:
            for index, part in enumerate(parts):
                if not self._rooms:
                    self._finish_oldest()
                flying = _Part(self._rooms.pop())
                generations = self._disk.next_numbers(len(part))
                flying.job = self._encoders.submit(self._write_part, index, part, generations, flying, batch)
                self._in_flight.append(flying)
            with batch.changed:
                batch.changed.wait_for(lambda: batch.num_placed == len(parts))
            if batch.error is not None:
                raise batch.error
            is_kept = True
        finally:
            if not is_kept:
                with batch.changed:
                    batch.is_over = True
                self.discard(batch.placed)
        return batch.placed, batch.full

    def finish(self) -> None:
        """Return when what was begun is written, and synced unless durability is `none`; may be called again.

        Raises:
            StoreIOError: the device failed; discard what was begun. Likewise the others.
            CapacityError: the file system filled up while it was written to.
        """
        began_s = time.perf_counter()
        while self._in_flight:
            self._finish_oldest()
        if self._unsynced and self._disk.config.durability.survives_power_cut:
            self._disk.files.sync(self._unsynced)
        self._unsynced.clear()
        self._disk.meter.add(TierStats(write_s=time.perf_counter() - began_s))

    def discard(self, placed: Sequence[PlacedBlock]) -> None:
        """Give up what will not be committed."""
        wait([part.job for part in self._in_flight])
        while self._in_flight:  # memory and extents are in use until the last write has ended, well or badly
            part = self._in_flight.popleft()
            while part.tickets:
                with suppress(KVStoreError):  # the first error is on its way to the caller already
                    part.tickets[-1].wait()
                part.tickets.pop()
            self._rooms.append(part.at)
        self._disk.allocator.release(each.record.extent for each in placed)

    def close(self) -> None:
        """Give the staging memory back."""
        self._memory.release()
        del self._arena

    def _finish_oldest(self) -> None:
        """Wait until a part is written, and take its memory back; what fails stays in flight for `discard`."""
        part = self._in_flight[0]
        counts = part.job.result()
        while part.tickets:  # no name for one: the error's traceback would keep it, and its file open
            part.tickets[-1].wait()
            part.tickets.pop()
        self._rooms.append(self._in_flight.popleft().at)
        self._disk.meter.add(counts)

    def _write_part(
        self, index: int, blocks: Sequence[NewRecord], generations: Sequence[int], part: _Part, batch: _Batch
    ) -> TierStats:
        """Encode blocks, place them, begin to write them; returns what to count."""
        packed: list[PackedRecord] = []
        error: BaseException | None = None
        began_s = time.perf_counter()
        try:
            packed = self._encode(blocks, generations, part.at)
        except BaseException as caught:  # noqa: BLE001 - the batch's, whatever it is
            error = caught
        encode_s = time.perf_counter() - began_s
        extents = self._place(index, blocks[: len(packed)], packed, error, batch)
        for file_id, ops in transfers(extents, part.at).items():
            part.tickets.append(self._pool.submit_write(self._disk.files.file(file_id), self._arena, ops))
        nbytes = sum(extent.nbytes for extent in extents)
        return TierStats(written_blocks=len(extents), written_nbytes=nbytes, encode_s=encode_s)

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
                if batch.full is None and batch.error is None and not batch.is_over:
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
