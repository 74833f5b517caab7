# SPDX-License-Identifier: Apache-2.0
"""Accounts for every byte of the extent files, and checks that the tables of the catalogue agree with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.errors import KVStoreError
from kvstore.layout import ALIGNMENT
from kvstore.spec import BlockKey
from kvstore.tiers.catalogue import ReadView, Table
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.placing.free_space import FreeSpace
from kvstore.tiers.tables.awaited import awaited_rows, make_rows
from kvstore.tiers.tables.blocks import find_block, find_sound, has_block
from kvstore.tiers.tables.object_rows import every_row
from kvstore.tiers.tables.records import check_key, unpack_extent


@dataclass(frozen=True, slots=True)
class ByteAccount:
    """Where the bytes of the extent files are.

    Args:
        record_nbytes: records of blocks, and bodies of objects.
        padding_nbytes: headers in front of them and zeros behind them.
        orphan_nbytes: extents that belong to no sound block.
        free_nbytes: free, by the writer's list where there is a writer, else all that the catalogue does not name.
        beyond_nbytes: of all these, bytes behind the end of their file: it was cut, or is gone.
        file_nbytes: length of all files.
    """

    record_nbytes: int = 0
    padding_nbytes: int = 0
    orphan_nbytes: int = 0
    free_nbytes: int = 0
    beyond_nbytes: int = 0
    file_nbytes: int = 0

    @property
    def unaccounted_nbytes(self) -> int:
        """Bytes of the files that are nothing of all that: 0, or something leaked (above 0) or is owned twice."""
        named = self.record_nbytes + self.padding_nbytes + self.orphan_nbytes + self.free_nbytes - self.beyond_nbytes
        return self.file_nbytes - named


class TableCheck:
    """One walk over the tables of a snapshot.

    Args:
        disk: the store; a writer's is held still by its caller.
        view: the snapshot.
        needed: how many stream entries name each block.
        bodies: how many objects of streams name each body.
    """

    def __init__(
        self, disk: DiskTier, view: ReadView, needed: Mapping[BlockKey, int], bodies: Mapping[BlockKey, int]
    ) -> None:
        self._disk = disk
        self._view = view
        self._needed = needed
        self._bodies = bodies
        self._num_bodies = 0
        self.account = ByteAccount()
        self.problems: list[str] = []
        """Contradictions between the tables, in words."""

    def run(self) -> None:
        """Fill `account` and `problems`."""
        self._check_extents()
        self._check_blocks()
        counts = {table: self._view.count(table) for table in (Table.BLOCKS, Table.DIRECTORIES, Table.EXTENTS)}
        if counts[Table.BLOCKS] != counts[Table.EXTENTS] or (
            counts[Table.BLOCKS] != counts[Table.DIRECTORIES] + self._num_bodies
        ):
            self.problems.append("tables differ in length: " + ", ".join(f"{t.name} {n}" for t, n in counts.items()))
        if self.account.unaccounted_nbytes:
            self.problems.append(f"{self.account.unaccounted_nbytes} bytes of the extent files are not accounted for")

    def _check_extents(self) -> None:
        totals: Counter[str] = Counter()
        named: dict[int, list[tuple[int, int]]] = {}
        for packed_key, value in self._view.scan(Table.EXTENTS):
            try:
                extent, key = unpack_extent(packed_key, value)
            except KVStoreError as error:
                self.problems.append(f"extent {packed_key.hex()}: {error}")
                continue
            before = named.setdefault(extent.file_id, [])
            if before and extent.offset < sum(before[-1]):
                self.problems.append(f"file {extent.file_id}: the extent at {extent.offset} overlaps the one before it")
            before.append((extent.offset, extent.nbytes))
            record = find_sound(self._view, key)
            if record is None or record.extent != extent:
                self.problems.append(f"file {extent.file_id}: the extent at {extent.offset} belongs to no block")
                totals["orphan"] += extent.nbytes
            else:
                totals["record"] += record.record_nbytes
                totals["padding"] += extent.nbytes - record.record_nbytes
        sizes = self._disk.files.sizes()  # once: a writer in another process may lengthen them meanwhile
        for file_id, size in sizes.items():
            named.setdefault(file_id, [])
            totals["file"] += size
            totals["free"] += size % ALIGNMENT
            totals["beyond"] -= size // ALIGNMENT * ALIGNMENT
        self._add_free(named, sizes, totals)
        self.account = ByteAccount(
            *(totals[name] for name in ("record", "padding", "orphan", "free", "beyond", "file"))
        )

    def _add_free(
        self, named: Mapping[int, list[tuple[int, int]]], sizes: Mapping[int, int], totals: Counter[str]
    ) -> None:
        """Add what is free, and the length of the address ranges that it and the extents fill."""
        if not self._disk.is_writable:
            for file_id, pieces in named.items():  # a reader knows no list: what is not named is free
                space = FreeSpace.around(pieces, sizes.get(file_id, 0) // ALIGNMENT * ALIGNMENT)
                totals["free"] += space.free_nbytes
                totals["beyond"] += space.nbytes
            return
        for file_id, space_nbytes in self._disk.allocator.lengths().items():
            totals["beyond"] += space_nbytes
            free = self._disk.allocator.free_ranges()[file_id]
            totals["free"] += sum(nbytes for _, nbytes in free)
            end = 0
            for offset, nbytes in sorted(free + named.get(file_id, [])):
                if offset < end:
                    self.problems.append(f"file {file_id}: the free list overlaps the extent at {offset}")
                end = max(end, offset + nbytes)

    def _check_blocks(self) -> None:
        idle: dict[bytes, int] = {}
        for packed_key, _ in self._view.scan(Table.BLOCKS):
            try:
                key = check_key(packed_key)
                record = find_block(self._view, key)
            except KVStoreError as error:
                self.problems.append(f"block {packed_key.hex()[:16]}: {error}")
                continue
            assert record is not None, "it was just seen in this snapshot"
            self._num_bodies += record.is_object
            references = self._needed.get(key, 0) + self._bodies.get(key, 0)
            if record.references != references:
                self.problems.append(
                    f"block {key.hex()[:16]}: {record.references} references counted, {references} found"
                )
            if record.references == 0:
                idle[key] = record.stamp
        lost = {key: count for key, count in self._needed.items() if not has_block(self._view, key)}
        awaited, expected = awaited_rows(self._view), make_rows(lost)
        if awaited != expected:
            wrong = len(awaited.items() ^ expected.items())
            self.problems.append(
                f"{len(expected)} blocks of streams are lost, {wrong} rows say so wrongly or not at all"
            )
        if (num_rows := sum(1 for _ in every_row(self._view))) > (num_owned := sum(self._bodies.values())):
            self.problems.append(f"{num_rows - num_owned} objects are damaged, or of no stream")
        listed = {value: int.from_bytes(stamp, "big") for stamp, value in self._view.scan(Table.LRU)}
        if listed != idle or len(listed) != self._view.count(Table.LRU):
            self.problems.append(
                f"{len(idle)} blocks may be evicted, {self._view.count(Table.LRU)} are listed, "
                f"{len(idle.items() & listed.items())} of them rightly"
            )
