# SPDX-License-Identifier: Apache-2.0
"""Turns blocks into records in extents: encode in parallel, write while the next ones are encoded. Commits nothing."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, wait
from contextlib import suppress
from itertools import accumulate

from kvstore.errors import CapacityError, KVStoreError
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

_HALF_NBYTES = 16 << 20
_MAX_LANES = 256
# A job costs some 50 us of Python, and the device waits for the first one.
_LEAST_JOB_NBYTES = 256 << 10
_MOST_JOB_NBYTES = 1 << 20


class RecordWriter:
    """Owns the staging memory of writes; used by one thread at a time, for one batch at a time.

    A batch begins with `write`, and ends with `finish`, after which it may be committed, or with `discard`.

    Memory: two halves of a few regions, each as large as the largest record of the layout.

    Args:
        disk: where extents come from.
        codecs: make the records.
        block_tokens: most tokens of a block.
        pool: moves the bytes.
        encoders: threads that encode.
        backing: is offered every record.
    """

    def __init__(
        self,
        disk: DiskTier,
        codecs: CodecShelf,
        block_tokens: int,
        pool: IoPool,
        encoders: Executor,
        backing: Backing | None = None,
    ) -> None:
        self._disk = disk
        self._codecs = codecs
        self._pool = pool
        self._encoders = encoders
        self._backing = backing
        self._region_nbytes = extent_nbytes(codecs.bound(block_tokens))
        self._lanes = max(1, min(_MAX_LANES, _HALF_NBYTES // self._region_nbytes))
        self._arena = Arena(2 * self._lanes * self._region_nbytes, False)
        self._memory = memoryview(self._arena)
        self._in_flight: tuple[list[Ticket], list[Ticket]] = ([], [])  # by half
        self._unsynced: set[int] = set()
        self._begun = TierStats()

    def write(
        self, blocks: Sequence[NewRecord], keep: Collection[BlockKey]
    ) -> tuple[list[PlacedBlock], CapacityError | None]:
        """Begin to write blocks to extents; their slots are the caller's again on return.

        Args:
            blocks: distinct keys.
            keep: blocks that must not be evicted to make room.

        Returns:
            What is being written, in order, and the error that stopped it early: the disk or the budget is full.

        Raises:
            StoreIOError: the device failed; nothing is kept.
            CapacityError: the file system filled up while it was written to; nothing is kept.
        """
        placed: list[PlacedBlock] = []
        full: CapacityError | None = None
        is_kept = False
        try:
            for number, start in enumerate(range(0, len(blocks), self._lanes)):
                _wait_all(self._in_flight[number % 2])
                full = self._write_lanes(blocks[start : start + self._lanes], number % 2, keep, placed)
                if full is not None:
                    break
            is_kept = True
        finally:
            if not is_kept:
                self.discard(placed)
        return placed, full

    def finish(self) -> None:
        """Return when what was begun is written, and synced unless durability is `none`; may be called again.

        Raises:
            StoreIOError, CapacityError: the device failed; discard what was begun.
        """
        began_s = time.perf_counter()
        for pending in self._in_flight:
            _wait_all(pending)
        if self._unsynced and self._disk.config.durability.survives_power_cut:
            self._disk.files.sync(self._unsynced)
        self._unsynced.clear()
        begun, self._begun = self._begun, TierStats()
        self._disk.meter.add(begun + TierStats(write_s=time.perf_counter() - began_s))

    def discard(self, placed: Sequence[PlacedBlock]) -> None:
        """Give up what will not be committed."""
        # The staging memory and the extents are in use until the last write has ended, well or badly.
        for ticket in (ticket for pending in self._in_flight for ticket in pending):
            with suppress(KVStoreError):  # the first error is on its way to the caller already
                ticket.wait()
        for pending in self._in_flight:
            pending.clear()
        self._unsynced.clear()
        self._begun = TierStats()
        self._disk.allocator.release(each.record.extent for each in placed)

    def close(self) -> None:
        """Give the staging memory back."""
        self._memory.release()
        del self._arena

    def _write_lanes(
        self, blocks: Sequence[NewRecord], half: int, keep: Collection[BlockKey], placed: list[PlacedBlock]
    ) -> CapacityError | None:
        """Encode blocks into one half of the memory; what is encoded is written while the rest still is being."""
        job_nbytes = len(blocks) * self._region_nbytes // 2
        job_nbytes = max(_LEAST_JOB_NBYTES, min(job_nbytes, _MOST_JOB_NBYTES))
        step = max(1, job_nbytes // self._region_nbytes)
        began_s = time.perf_counter()
        jobs = []
        for start in range(0, len(blocks), step):
            part, at = blocks[start : start + step], (half * self._lanes + start) * self._region_nbytes
            jobs.append((part, at, self._encoders.submit(self._encode, part, self._disk.next_numbers(len(part)), at)))
        full: CapacityError | None = None
        try:
            for part, at, job in jobs:
                full = self._submit(part, job.result(), at, half, keep, placed)
                if full is not None:
                    break
        finally:
            wait([job for *_, job in jobs])  # all: one that failed must not leave others writing to memory in use
        self._disk.meter.add(TierStats(encode_s=time.perf_counter() - began_s))
        return full

    def _encode(self, blocks: Sequence[NewRecord], generations: Sequence[int], at: int) -> list[PackedRecord]:
        out = self._memory[at : at + len(blocks) * self._region_nbytes]
        packed = pack(self._codecs.encoder(), self._codecs.profile, blocks, generations, out)
        if self._backing is not None:
            for block, each in zip(blocks, packed, strict=True):
                self._backing.offer(block.key, out[EXTENT_HEADER_NBYTES : EXTENT_HEADER_NBYTES + each.nbytes])
                out = out[extent_nbytes(each.nbytes) :]
        return packed

    def _submit(
        self,
        blocks: Sequence[NewRecord],
        packed: Sequence[PackedRecord],
        at: int,
        half: int,
        keep: Collection[BlockKey],
        placed: list[PlacedBlock],
    ) -> CapacityError | None:
        """Find places for packed extents and begin to write them; neighbours in one transfer."""
        extents, full = self._disk.allocate([extent_nbytes(each.nbytes) for each in packed], keep)
        for block, each, extent in zip(blocks, packed, extents, strict=False):
            number = each.generation
            record = BlockRecord(block.num_tokens, extent, each.nbytes, number, references=0, stamp=number)
            placed.append(PlacedBlock(block.key, record, each.directory))
        for file_id, ops in transfers(extents, at).items():
            self._unsynced.add(file_id)
            self._in_flight[half].append(self._pool.submit_write(self._disk.files.file(file_id), self._arena, ops))
        nbytes = sum(extent.nbytes for extent in extents)
        self._begun += TierStats(written_blocks=len(extents), written_nbytes=nbytes)
        return full


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


def _wait_all(tickets: list[Ticket]) -> None:
    while tickets:
        tickets[-1].wait()
        tickets.pop()
