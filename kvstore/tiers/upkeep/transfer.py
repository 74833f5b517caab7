# SPDX-License-Identifier: Apache-2.0
"""Records in and out of a store as they are: what exports, imports and remote tiers move without decoding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvstore.errors import KVStoreError, ReadOnlyError
from kvstore.native import Arena, IoPool, Ticket, seal_extent
from kvstore.record import probe
from kvstore.spec import BlockKey
from kvstore.stats import TierStats
from kvstore.tiers.base import Outcome
from kvstore.tiers.disk import DiskTier, Found
from kvstore.tiers.reading.extent_check import record_in
from kvstore.tiers.tables.blocks import PlacedBlock, find_stored, insert_blocks
from kvstore.tiers.tables.object_body import check_body
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, BlockRecord, extent_nbytes
from kvstore.tiers.writing.record_writer import transfers

_BATCH_NBYTES = 8 << 20
_MAX_EXTENT_NBYTES = 4 << 30
_MAX_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block as its record, or the body of an object.

    Args:
        key: its name.
        num_tokens: tokens in it; 0 for a body.
        record: the bytes that csrc/codec/FORMAT.md defines, or those of a body.
    """

    key: BlockKey
    num_tokens: int
    record: bytes


class RecordTransfer:
    """Reads and writes encoded blocks of one store. Thread-safe; holds a few MiB while a call runs, or one record.

    Args:
        disk: the store.
        pool: moves the bytes.
    """

    def __init__(self, disk: DiskTier, pool: IoPool) -> None:
        self._disk = disk
        self._pool = pool

    def read(self, keys: Sequence[BlockKey]) -> Iterator[EncodedBlock | None]:
        """Yield the blocks in order; None for one that is not stored or is damaged. Every record's CRC32C is checked.

        Memory holds a batch of them at a time; the catalogue is asked again for each batch.
        """
        start = 0
        while start < len(keys):
            found = self._disk.look_up(keys[start : start + 256], [False] * len(keys[start : start + 256]))
            nbytes, count = 0, 0
            for each in found:
                nbytes += each.record.extent.nbytes if isinstance(each, Found) else 0
                if count and nbytes > _BATCH_NBYTES:
                    break
                count += 1
            yield from self._read_batch(keys[start : start + count], found[:count])
            start += count

    def write(self, blocks: Sequence[EncodedBlock], keep: Collection[BlockKey] = ()) -> list[Outcome]:
        """Store blocks as `Store.put` does: plain, evictable, durable on return, idempotent.

        Args:
            blocks: what to store; one whose key is there stays as it is and counts as `STORED`.
            keep: blocks that must not be evicted to make room; those of the call never are.

        Returns:
            Per block `STORED`, `DAMAGED` for bytes that are no record of as many tokens, or `FULL`.

        Raises:
            StoreIOError: the device failed; earlier batches of the call are stored.
            ReadOnlyError: the store is open for reading.
        """
        if not self._disk.is_writable:
            raise ReadOnlyError(f"{self._disk.folder}: open for reading; open it with Access.WRITE")
        outcomes = [Outcome.FULL] * len(blocks)
        kept = {block.key for block in blocks}.union(keep)
        batch: list[tuple[int, EncodedBlock, bytes]] = []
        nbytes = 0
        for position, block in enumerate(blocks):
            directory = directory_of(block)
            if directory is None:
                outcomes[position] = Outcome.DAMAGED
                continue
            if batch and nbytes + extent_nbytes(len(block.record)) > _BATCH_NBYTES:
                self._write_batch(batch, kept, outcomes)
                batch, nbytes = [], 0
            batch.append((position, block, directory))
            nbytes += extent_nbytes(len(block.record))
        if batch:
            self._write_batch(batch, kept, outcomes)
        return outcomes

    def _read_batch(
        self, keys: Sequence[BlockKey], found: Sequence[Found | KVStoreError | None]
    ) -> Iterator[EncodedBlock | None]:
        blocks: dict[BlockKey, EncodedBlock] = {}
        pending = {key: each for key, each in zip(keys, found, strict=True) if isinstance(each, Found)}
        for _ in range(_MAX_ROUNDS):
            if not pending:
                break
            blocks |= self._read_found(pending)
            missed = [key for key in pending if key not in blocks]
            # A writer may have moved or replaced them since the look-up: then the catalogue says so now.
            again = zip(missed, self._disk.look_up(missed, [False] * len(missed)), strict=True)
            pending = {key: each for key, each in again if isinstance(each, Found) and each != pending[key]}
        yield from (blocks.get(key) for key in keys)

    def _read_found(self, wanted: dict[BlockKey, Found]) -> dict[BlockKey, EncodedBlock]:
        """Read and check; what cannot be read is left out."""
        blocks: dict[BlockKey, EncodedBlock] = {}
        sane = {key: each.record for key, each in wanted.items() if each.record.extent.nbytes <= _MAX_EXTENT_NBYTES}
        if not sane:
            return blocks
        arena = Arena(sum(record.extent.nbytes for record in sane.values()), False)
        tickets: list[tuple[BlockKey, int, Ticket]] = []
        at = 0
        for key, record in sane.items():
            with suppress(KVStoreError):
                file = self._disk.files.file(record.extent.file_id)
                op = (record.extent.offset, at, record.extent.nbytes)
                tickets.append((key, at, self._pool.submit_read(file, arena, [op])))
            at += record.extent.nbytes
        with memoryview(arena) as memory:
            for key, start, ticket in tickets:
                with suppress(KVStoreError):
                    ticket.wait()
                    data = memory[start : start + sane[key].extent.nbytes]
                    blocks[key] = EncodedBlock(key, sane[key].num_tokens, bytes(record_in(data, key, sane[key])))
        return blocks

    def _write_batch(
        self, batch: Sequence[tuple[int, EncodedBlock, bytes]], keep: Collection[BlockKey], outcomes: list[Outcome]
    ) -> None:
        with self._disk.changing():
            with self._disk.catalogue.read() as view:
                stored = find_stored(view, [block.key for _, block, _ in batch])
            new = {block.key: (block, head) for _, block, head in batch if block.key not in stored}
            placed = self._write_new(list(new.values()), keep)
            if placed:
                self._disk.commit(lambda view: insert_blocks(view, placed), keep)
        refused = new.keys() - {each.key for each in placed}
        for position, block, _ in batch:
            outcomes[position] = Outcome.FULL if block.key in refused else Outcome.STORED

    def _write_new(self, blocks: Sequence[tuple[EncodedBlock, bytes]], keep: Collection[BlockKey]) -> list[PlacedBlock]:
        """Write records to extents, in order, as far as there is room; synced on return unless durability is `none`."""
        extents, _ = self._disk.allocate([extent_nbytes(len(block.record)) for block, _ in blocks], keep)
        if not extents:
            return []
        arena = Arena(sum(extent.nbytes for extent in extents), False)
        placed: list[PlacedBlock] = []
        at = 0
        for (block, directory), extent in zip(blocks, extents, strict=False):
            number = self._disk.next_number()
            with memoryview(arena)[at : at + extent.nbytes] as room:
                room[EXTENT_HEADER_NBYTES : EXTENT_HEADER_NBYTES + len(block.record)] = block.record
                seal_extent(block.key, number, len(block.record), room)
            record = BlockRecord(block.num_tokens, extent, len(block.record), number, references=0, stamp=number)
            placed.append(PlacedBlock(block.key, record, directory))
            at += extent.nbytes
        writes = transfers(extents, 0)
        opened = {file_id: self._disk.files.file(file_id) for file_id in writes}
        wait_all([self._pool.submit_write(opened[file_id], arena, ops) for file_id, ops in writes.items()])
        if self._disk.config.durability.survives_power_cut:
            self._disk.files.sync(writes)
        self._disk.meter.add(TierStats(written_blocks=len(placed), written_nbytes=at))
        return placed


def wait_all(tickets: Sequence[Ticket]) -> None:
    """Wait until nothing is in flight, then raise the first error: what the transfers use must outlive all of them."""
    errors: list[BaseException] = []
    for ticket in tickets:
        try:
            ticket.wait()
        except BaseException as error:  # noqa: BLE001 - an interrupt waits for the rest, too
            errors.append(error)
    if errors:
        raise errors[0]


def directory_of(block: EncodedBlock) -> bytes | None:
    """Return the header and plane directory of a block's record; None unless it is a record of as many tokens.

    The body of an object has none, and is checked whole.
    """
    with suppress(KVStoreError):
        if block.num_tokens == 0:
            check_body(block.record)
            return b""
        info = probe(block.record)
        if info.num_tokens == block.num_tokens and info.total_nbytes == len(block.record):
            return block.record[: info.header_nbytes]
    return None
