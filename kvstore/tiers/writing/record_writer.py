# SPDX-License-Identifier: Apache-2.0
"""Turns blocks into records in extents: encode in parallel, write while the next ones are encoded. Commits nothing."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, wait
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from kvstore.codec import Codec
from kvstore.errors import CapacityError, KVStoreError
from kvstore.native import Arena, IoPool, Ticket, crc32c
from kvstore.spec import BlockKey
from kvstore.stats import TierStats
from kvstore.tiers.base import Extent
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.moving.backing import Backing
from kvstore.tiers.tables.records import (
    EXTENT_HEADER_NBYTES,
    BlockRecord,
    ExtentHeader,
    extent_nbytes,
    pack_extent_header,
)

_HALF_NBYTES = 16 << 20
_MAX_LANES = 64
# A job costs some 20 us of Python: small blocks are encoded several by one.
_JOB_NBYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class NewRecord:
    """A block to be written.

    Args:
        key: its name.
        slot: [slot_nbytes] uint8 CPU, unchanged until `RecordWriter.write` returns.
        num_tokens: tokens in it.
        first_token: position of the first one in its stream.
    """

    key: BlockKey
    slot: Tensor
    num_tokens: int
    first_token: int


@dataclass(frozen=True, slots=True)
class WrittenRecord:
    """A block whose extent is written and not yet in the catalogue."""

    key: BlockKey
    record: BlockRecord
    directory: bytes


@dataclass(frozen=True, slots=True)
class _Encoded:
    region: int
    record_nbytes: int
    directory: bytes
    record_crc32c: int


class RecordWriter:
    """Owns the staging memory of writes; used by one thread at a time.

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

    def write(
        self, blocks: Sequence[NewRecord], keep: Collection[BlockKey]
    ) -> tuple[list[WrittenRecord], CapacityError | None]:
        """Write blocks to extents; unless durability is `none` they are synced on return.

        Args:
            blocks: distinct keys.
            keep: blocks that must not be evicted to make room.

        Returns:
            What was written, in order, and the error that stopped it early: the disk or the budget is full.

        Raises:
            StoreIOError: the device failed; nothing is kept.
            CapacityError: the file system filled up while it was written to; nothing is kept.
        """
        written: list[WrittenRecord] = []
        full: CapacityError | None = None
        tickets: tuple[list[Ticket], list[Ticket]] = ([], [])
        is_kept = False
        try:
            for number, start in enumerate(range(0, len(blocks), self._lanes)):
                half = number % 2
                _wait_all(tickets[half])
                full = self._write_lanes(blocks[start : start + self._lanes], half, keep, written, tickets[half])
                if full is not None:
                    break
            began_s = time.perf_counter()
            for pending in tickets:
                _wait_all(pending)
            if written and self._disk.config.durability.survives_power_cut:
                self._disk.files.sync(each.record.extent.file_id for each in written)
            self._count(written, time.perf_counter() - began_s)
            is_kept = True
        finally:
            if not is_kept:
                # The staging memory and the extents are in use until the last write has ended, well or badly.
                _drain(tickets)
                self.discard(written)
        return written, full

    def discard(self, written: Sequence[WrittenRecord]) -> None:
        """Give up what was written and will not be committed."""
        self._disk.allocator.release(each.record.extent for each in written)

    def close(self) -> None:
        """Give the staging memory back."""
        self._memory.release()
        del self._arena

    def _write_lanes(
        self,
        blocks: Sequence[NewRecord],
        half: int,
        keep: Collection[BlockKey],
        written: list[WrittenRecord],
        tickets: list[Ticket],
    ) -> CapacityError | None:
        """Encode blocks into one half of the memory; what is encoded is written while the rest still is being."""
        first = half * self._lanes
        step = max(1, _JOB_NBYTES // self._region_nbytes)
        parts = [blocks[start : start + step] for start in range(0, len(blocks), step)]
        began_s = time.perf_counter()
        jobs = [
            self._encoders.submit(self._encode_some, part, first + number * step) for number, part in enumerate(parts)
        ]
        full: CapacityError | None = None
        try:
            for part, job in zip(parts, jobs, strict=True):
                full = self._submit(part, job.result(), keep, written, tickets)
                if full is not None:
                    break
        finally:
            wait(jobs)  # all of them: one that failed must not leave others writing to memory that is used again
        self._disk.meter.add(TierStats(encode_s=time.perf_counter() - began_s))
        return full

    def _encode_some(self, blocks: Sequence[NewRecord], first: int) -> list[_Encoded]:
        return [self._encode_one(block, first + lane) for lane, block in enumerate(blocks)]

    def _encode_one(self, block: NewRecord, region: int) -> _Encoded:
        start = region * self._region_nbytes
        out = self._memory[start + EXTENT_HEADER_NBYTES : start + self._region_nbytes]
        nbytes = self._codecs.encoder().encode(block.slot, block.num_tokens, block.first_token, out)
        record = out[:nbytes]
        header_nbytes = Codec.probe(record).header_nbytes
        if self._backing is not None:
            self._backing.offer(block.key, record)
        return _Encoded(region, nbytes, bytes(record[:header_nbytes]), crc32c(record))

    def _submit(
        self,
        blocks: Sequence[NewRecord],
        encoded: Sequence[_Encoded],
        keep: Collection[BlockKey],
        written: list[WrittenRecord],
        tickets: list[Ticket],
    ) -> CapacityError | None:
        transfers: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        full: CapacityError | None = None
        for block, each in zip(blocks, encoded, strict=True):
            try:
                extent = self._disk.allocate(extent_nbytes(each.record_nbytes), keep)
            except CapacityError as error:
                full = error
                break
            written.append(self._seal(block, each, extent))
            transfers[extent.file_id].append((extent.offset, each.region * self._region_nbytes, extent.nbytes))
        for file_id, ops in transfers.items():
            tickets.append(self._pool.submit_write(self._disk.files.file(file_id), self._arena, ops))
        return full

    def _seal(self, block: NewRecord, encoded: _Encoded, extent: Extent) -> WrittenRecord:
        """Put the extent header in front and zeros behind the record."""
        generation = self._disk.next_number()
        start = encoded.region * self._region_nbytes
        record_end = start + EXTENT_HEADER_NBYTES + encoded.record_nbytes
        header = ExtentHeader(block.key, generation, encoded.record_nbytes, encoded.record_crc32c)
        self._memory[start : start + EXTENT_HEADER_NBYTES] = pack_extent_header(header)
        self._memory[record_end : start + extent.nbytes] = bytes(start + extent.nbytes - record_end)
        record = BlockRecord(
            num_tokens=block.num_tokens,
            extent=extent,
            record_nbytes=encoded.record_nbytes,
            generation=generation,
            references=0,
            stamp=generation,
        )
        return WrittenRecord(block.key, record, encoded.directory)

    def _count(self, written: Sequence[WrittenRecord], write_s: float) -> None:
        nbytes = sum(each.record.extent.nbytes for each in written)
        self._disk.meter.add(TierStats(written_blocks=len(written), written_nbytes=nbytes, write_s=write_s))


def _wait_all(tickets: list[Ticket]) -> None:
    while tickets:
        tickets.pop().wait()


def _drain(tickets: Sequence[list[Ticket]]) -> None:
    """Wait until nothing is in flight; the first error is on its way to the caller already."""
    for ticket in (ticket for pending in tickets for ticket in pending):
        with suppress(KVStoreError):
            ticket.wait()
