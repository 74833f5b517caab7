# SPDX-License-Identifier: Apache-2.0
"""Repair: drops what is damaged, makes the tables agree again, and says what it did. What is sound is not touched."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from kvstore.errors import CorruptRecordError, KVStoreError, ReadOnlyError, UnsupportedFormatError
from kvstore.native import IoPool
from kvstore.spec import BLOCK_KEY_NBYTES, BlockKey
from kvstore.tiers.catalogue import Table, WriteView
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.reading.verify import Verifier
from kvstore.tiers.tables.awaited import awaited_rows, make_rows
from kvstore.tiers.tables.blocks import find_block, find_directory
from kvstore.tiers.tables.records import BlockRecord, pack_block, pack_extent, pack_stamp
from kvstore.tiers.upkeep.mend_streams import mend_streams
from kvstore.tiers.upkeep.transfer import RecordTransfer, directory_of


@dataclass(slots=True)
class RepairReport:
    """What a repair did.

    Args:
        num_blocks: blocks that it read.
        dropped: blocks that were damaged and are gone, with the reason.
        unreadable: blocks that cannot be read or decoded here and now, with the reason: they were left alone.
        mended: what else was changed, in words.
        lost: stream and index of entries whose blocks are not stored. They stay, so that all others keep their places,
            and are missed by who asks for them, until an import or a producer brings the blocks back.
    """

    num_blocks: int = 0
    dropped: dict[BlockKey, str] = field(default_factory=dict)
    unreadable: dict[BlockKey, str] = field(default_factory=dict)
    mended: list[str] = field(default_factory=list)
    lost: list[tuple[str, int]] = field(default_factory=list)

    @property
    def has_changed(self) -> bool:
        """Whether anything was done."""
        return bool(self.dropped or self.mended)


class Repairer:
    """Repairs one store. Nobody else may write meanwhile; the changes are two transactions, each whole or not at all.

    Args:
        disk: the store, open for writing.
        pool: moves the bytes.

    Raises:
        ReadOnlyError: the store is open for reading.
    """

    def __init__(self, disk: DiskTier, pool: IoPool) -> None:
        if not disk.is_writable:
            raise ReadOnlyError(f"{disk.folder}: open for reading; open it with Access.WRITE")
        self._disk = disk
        self._verifier = Verifier(disk, pool, None)
        self._transfer = RecordTransfer(disk, pool)
        self._report = RepairReport()

    def run(self, progress: Callable[[int, int], None] | None = None) -> RepairReport:
        """Read every block, then mend.

        Args:
            progress: called with blocks read and blocks in all.

        Raises:
            CapacityError: the catalogue has no room to grow; nothing has changed.
            StoreIOError: the catalogue cannot be written; nothing has changed.
        """
        with self._disk.changing():
            damaged = self._find_damage(progress)
            damaged = self._mend_directories(damaged)
            self._report.dropped = {key: str(error) for key, error in damaged.items()}
            before = self._report.mended
            self._report.mended, self._report.lost = self._disk.catalogue.write(lambda view: self._mend(view, damaged))
            self._report.mended = before + self._report.mended
            if self._report.has_changed:
                self._disk.count_free_space()
        return self._report

    def _find_damage(self, progress: Callable[[int, int], None] | None) -> dict[BlockKey, KVStoreError]:
        with self._disk.catalogue.read() as view:
            keys = [BlockKey(key) for key in view.keys(Table.BLOCKS) if len(key) == BLOCK_KEY_NBYTES]
        sizes = self._disk.files.sizes()
        damaged: dict[BlockKey, KVStoreError] = {}
        for done, key in enumerate(keys, start=1):
            fault = self._verifier.block(key)
            if isinstance(fault, CorruptRecordError) or (fault is not None and self._is_gone(key, sizes)):
                damaged[key] = fault
            elif fault is not None:
                self._report.unreadable[key] = str(fault)
            self._report.num_blocks += 1
            if progress is not None:
                progress(done, len(keys))
        return damaged

    def _is_gone(self, key: BlockKey, sizes: dict[int, int]) -> bool:
        """Whether a block has no sound entry, or lies behind the end of a file that is there.

        A file that is away may come back, and a device that fails may recover.
        """
        try:
            with self._disk.catalogue.read() as view:
                record = find_block(view, key)
        except UnsupportedFormatError:
            return True
        return record is not None and record.extent.end > sizes.get(record.extent.file_id, record.extent.end)

    def _mend_directories(self, damaged: dict[BlockKey, KVStoreError]) -> dict[BlockKey, KVStoreError]:
        """Take the directory from the record where that is sound; returns what stays damaged."""
        found = {block.key: directory_of(block) for block in self._transfer.read(list(damaged)) if block is not None}
        mended = {key: directory for key, directory in found.items() if directory is not None}

        def mend(view: WriteView) -> int:
            wrong = [key for key, directory in mended.items() if find_directory(view, key) != directory]
            for key in wrong:
                view.put(Table.DIRECTORIES, key, mended[key])
            return len(wrong)

        count = self._disk.catalogue.write(mend) if mended else 0
        still = {key: fault for key in mended if (fault := self._verifier.block(key)) is not None}
        if count:
            self._report.mended.append(f"{count} plane directories taken from their records")
        return {key: still.get(key, error) for key, error in damaged.items() if key in still or key not in mended}

    def _mend(self, view: WriteView, damaged: dict[BlockKey, KVStoreError]) -> tuple[list[str], list[tuple[str, int]]]:
        mended: list[str] = []
        records = self._drop_blocks(view, damaged, mended)
        needed, lost = mend_streams(view, records.keys(), mended)
        unnamed = [key for key, record in records.items() if record.is_object and key not in needed]
        for key in unnamed:
            view.delete(Table.BLOCKS, key)
            del records[key]
        if unnamed:
            mended.append(f"{len(unnamed)} bodies of no object dropped")
        extents: dict[bytes, bytes] = {}
        idle: dict[bytes, bytes] = {}
        num_counted = 0
        for key, record in records.items():
            extents.update([pack_extent(record.extent, key)])
            references = needed.get(key, 0)
            stamp = record.stamp
            if references == 0:
                while pack_stamp(stamp) in idle:
                    stamp = self._disk.next_number()
                idle[pack_stamp(stamp)] = key
            if (references, stamp) != (record.references, record.stamp):
                num_counted += 1
                view.put(Table.BLOCKS, key, pack_block(replace(record, references=references, stamp=stamp)))
        if num_counted:
            mended.append(f"table blocks: {num_counted} reference counts or stamps were wrong")
        _make_equal(view, Table.EXTENTS, dict(view.scan(Table.EXTENTS)), extents, mended)
        _make_equal(view, Table.LRU, dict(view.scan(Table.LRU)), idle, mended)
        awaited = {key: count for key, count in needed.items() if key not in records}
        _make_equal(view, Table.META, awaited_rows(view), make_rows(awaited), mended)
        orphans = [key for key in view.keys(Table.DIRECTORIES) if key not in records]
        for orphan in orphans:
            view.delete(Table.DIRECTORIES, orphan)
        if orphans:
            mended.append(f"table directories: {len(orphans)} rows of no block dropped")
        return mended, lost

    def _drop_blocks(
        self, view: WriteView, damaged: Collection[BlockKey], mended: list[str]
    ) -> dict[BlockKey, BlockRecord]:
        """Drop damaged blocks and rows that are no blocks; returns the others."""
        records: dict[BlockKey, BlockRecord] = {}
        for packed in view.keys(Table.BLOCKS):
            key = BlockKey(packed)
            if len(packed) != BLOCK_KEY_NBYTES:
                mended.append(f"table blocks: row {packed.hex()[:16]} is no block and was dropped")
                view.delete(Table.BLOCKS, packed)
            elif key in damaged:
                view.delete(Table.BLOCKS, packed)
            else:
                record = find_block(view, key)
                assert record is not None, "it was listed in this transaction"
                records[key] = record
        return records


def _make_equal(
    view: WriteView, table: Table, present: dict[bytes, bytes], rows: dict[bytes, bytes], mended: list[str]
) -> None:
    """Give a table these rows instead of those that are present; touch only what differs."""
    wrong = [key for key, value in present.items() if rows.get(key) != value]
    missing = [key for key, value in rows.items() if present.get(key) != value]
    for key in wrong:
        view.delete(table, key)
    for key in missing:
        view.put(table, key, rows[key])
    if wrong or missing:
        mended.append(f"table {table.value.decode()}: {len(wrong)} rows dropped, {len(missing)} written")
