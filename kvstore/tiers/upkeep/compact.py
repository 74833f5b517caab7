# SPDX-License-Identifier: Apache-2.0
"""Compaction: moves extents into holes before them and gives the files' tails back, step by step, beside everybody."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from kvstore.errors import ConfigError, KVStoreError, ReadOnlyError
from kvstore.native import Arena, IoPool, Ticket
from kvstore.spec import BlockKey
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import ReadView, WriteView
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.placing.allocator import MIN_STEP_NBYTES
from kvstore.tiers.reading.extent_check import record_in
from kvstore.tiers.tables.blocks import allocated_backwards, find_block, move_block
from kvstore.tiers.tables.records import BlockRecord
from kvstore.tiers.upkeep.transfer import wait_all

STEP_NBYTES = 16 << 20
_ROWS_PER_STEP = 4096


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What a compaction did.

    Args:
        moved_blocks: blocks that lie elsewhere now; one that moved twice counts twice.
        moved_nbytes: bytes of their extents.
        before_nbytes: length of the extent files when it began.
        after_nbytes: length when it ended.
    """

    moved_blocks: int
    moved_nbytes: int
    before_nbytes: int
    after_nbytes: int


@dataclass(frozen=True, slots=True)
class _Move:
    key: BlockKey
    record: BlockRecord
    target: Extent


class Compactor:
    """Compacts one store. Each step holds the store's writers up for as long as it takes to copy `step_nbytes`.

    A step copies extents to places that nothing names, syncs them, commits their new places, and only then frees the
    old ones. A kill leaves the one place or the other; a reader that looked up the old place finds the same bytes
    there, or another record's, and looks again. It ends when no hole could take an extent from behind it, so that each
    hole that is left is smaller than every extent behind it: the files are less than twice as long as what they hold,
    and hold no hole at all where all extents have one size.

    Args:
        disk: the store, open for writing.
        pool: moves the bytes.
        step_nbytes: most bytes that a step copies, or one extent.

    Raises:
        ReadOnlyError: the store is open for reading.
        ConfigError: `step_nbytes` is not positive.
    """

    def __init__(self, disk: DiskTier, pool: IoPool, step_nbytes: int = STEP_NBYTES) -> None:
        if not disk.is_writable:
            raise ReadOnlyError(f"{disk.folder}: open for reading; open it with Access.WRITE")
        if step_nbytes < 1:
            raise ConfigError(f"step_nbytes is {step_nbytes}; it must be positive")
        self._disk = disk
        self._pool = pool
        self._step_nbytes = step_nbytes
        self._before: Extent | None = None
        self._moved_blocks = 0
        self._moved_nbytes = 0
        self._moved_in_sweep = False

    def run(self, progress: Callable[[int, int], None] | None = None) -> CompactReport:
        """Step until nothing more can be moved.

        Args:
            progress: called with the bytes moved so far and the length of the files.

        Raises:
            StoreIOError: the device failed to write; what was moved before stays moved.
            CapacityError: the catalogue has no room to grow.
        """
        before_nbytes = self._disk.allocator.file_nbytes
        while self.step():
            if progress is not None:
                progress(self._moved_nbytes, self._disk.allocator.file_nbytes)
        with self._disk.mutation:
            self._disk.allocator.trim(0)
        return CompactReport(self._moved_blocks, self._moved_nbytes, before_nbytes, self._disk.allocator.file_nbytes)

    def step(self) -> bool:
        """Move as much as one step may, from the end of the files backwards; returns whether there may be more."""
        with self._disk.changing():
            with self._disk.catalogue.read() as view:
                moves = self._choose(view)
            moved = self._execute(moves)
            self._disk.allocator.trim(MIN_STEP_NBYTES)
        self._moved_blocks += len(moved)
        self._moved_nbytes += sum(move.target.nbytes for move in moved)
        self._moved_in_sweep |= bool(moved)
        if self._before is not None:
            return True
        # Holes that a sweep left behind may suit extents that it had passed: it ends when one moved nothing.
        goes_on, self._moved_in_sweep = self._moved_in_sweep, False
        return goes_on

    def _choose(self, view: ReadView) -> list[_Move]:
        """Take the next extents that fit into holes before them; leaves `_before` None at the end of a sweep."""
        moves: list[_Move] = []
        nbytes = 0
        start, self._before = self._before, None
        last = start
        for num_rows, (extent, key) in enumerate(allocated_backwards(view, start)):
            if num_rows == _ROWS_PER_STEP or (moves and nbytes + extent.nbytes > self._step_nbytes):
                self._before = last
                break
            last = extent
            if not self._disk.allocator.has_hole_before(extent):
                break
            with suppress(KVStoreError):  # damage stays where it is: repair drops it
                record = find_block(view, key)
                if record is None or record.extent != extent:
                    continue
                target = self._disk.allocator.allocate_before(extent)
                if target is not None:
                    moves.append(_Move(key, record, target))
                    nbytes += extent.nbytes
        return moves

    def _execute(self, moves: list[_Move]) -> list[_Move]:
        """Copy, sync, commit, free; returns the moves that took place."""
        moved = self._copy(moves)
        self._disk.catalogue.write(lambda view: _name(view, moved))
        done = {move.key for move in moved}
        self._disk.allocator.release(move.target for move in moves if move.key not in done)
        self._disk.allocator.release(move.record.extent for move in moved)
        return moved

    def _copy(self, moves: list[_Move]) -> list[_Move]:
        """Bring the bytes to their new places, durably where the store promises that; skips what is damaged."""
        if not moves:
            return []
        sound: list[_Move] = []
        files = self._disk.files
        arena = Arena(sum(move.target.nbytes for move in moves), False)
        reads: list[tuple[_Move, int, Ticket]] = []
        at = 0
        for move in moves:
            with suppress(KVStoreError):
                op = (move.record.extent.offset, at, move.target.nbytes)
                file = files.file(move.record.extent.file_id)
                reads.append((move, at, self._pool.submit_read(file, arena, [op])))
            at += move.target.nbytes
        transfers: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        with memoryview(arena) as memory:
            for move, start, ticket in reads:
                with suppress(KVStoreError):
                    ticket.wait()
                    record_in(memory[start : start + move.target.nbytes], move.key, move.record)
                    transfers[move.target.file_id].append((move.target.offset, start, move.target.nbytes))
                    sound.append(move)
        opened = {file_id: files.file(file_id) for file_id in transfers}
        wait_all([self._pool.submit_write(opened[file_id], arena, ops) for file_id, ops in transfers.items()])
        if self._disk.config.durability.survives_power_cut:
            files.sync(transfers)
        return sound


def _name(view: WriteView, moved: list[_Move]) -> None:
    for move in moved:
        move_block(view, move.key, replace(move.record, extent=move.target))
