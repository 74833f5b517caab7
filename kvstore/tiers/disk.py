# SPDX-License-Identifier: Apache-2.0
"""Disk tier: joins the catalogue and the extent files of one store folder, under one budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from kvstore.config import Access, StoreConfig
from kvstore.errors import CapacityError, KVStoreError, StoreNotFoundError
from kvstore.policy import choose_victims, eviction_target
from kvstore.spec import BlockKey
from kvstore.stats import DiskUsage, Meter, TierStats
from kvstore.tiers.base import Extent
from kvstore.tiers.calibrations import Calibrations
from kvstore.tiers.catalogue import Catalogue, WriteView
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.lock import claim_folder
from kvstore.tiers.placing.allocator import ExtentAllocator
from kvstore.tiers.placing.extent_folders import add_folders
from kvstore.tiers.placing.taken import TakenBytes
from kvstore.tiers.room import describe_full
from kvstore.tiers.tables.blocks import (
    delete_block,
    find_block,
    find_directory,
    oldest_first,
    taken_extents,
    touch,
)
from kvstore.tiers.tables.folders import FolderMap, read_folders, write_folders
from kvstore.tiers.tables.meta import begin_epoch, check_format
from kvstore.tiers.tables.records import BlockRecord
from kvstore.tiers.uses import Uses

# What one commit does is bounded, however large the store is: nobody waits for more.
_MAX_TOUCHES_PER_COMMIT = 4096
_MAX_VICTIMS_PER_COMMIT = 4096
_MAX_EVICTION_NBYTES = 256 << 20
# Kept free of extents: the commit that names what filled the store may lengthen the catalogue.
_CATALOGUE_GROWTH_NBYTES = 128 << 10
_MOST_AHEAD = 8
"""Room for the next batch is made ahead where the store has room for this many."""


class Found(NamedTuple):
    """A block in the catalogue: where it lies and, if asked for, the first bytes of its record."""

    record: BlockRecord
    directory: bytes | None


class DiskTier:
    """One store folder: `catalogue/`, `extents/`, `writer.lock`.

    Everything that changes the store runs under `mutation`: what a writer has looked up stays true until it commits.

    Args:
        folder: the store; created by a writer.
        config: access, durability, budget.

    Raises:
        StoreNotFoundError: a reader found nothing.
        BusyError: another process writes it, or this process has it open.
        ReadOnlyError: a writer may not write there.
        CapacityError: the file system has no room for a new store.
        UnsupportedFormatError: made by a newer program.
        CorruptRecordError: the catalogue is damaged.
    """

    def __init__(self, folder: Path, config: StoreConfig) -> None:
        self.folder = folder
        self.config = config
        self.mutation = threading.RLock()
        self.meter = Meter()
        self.is_writable = config.access is Access.WRITE
        with ExitStack() as cleanup:
            if self.is_writable:
                self._lock = claim_folder(folder, is_durable=config.durability.survives_power_cut)
                cleanup.callback(self._lock.close)
            elif not folder.is_dir():
                raise StoreNotFoundError(f"{folder}: no store here; create it by opening it for writing")
            self.catalogue = Catalogue(
                folder / "catalogue",
                writable=self.is_writable,
                durable=config.durability.survives_power_cut,
            )
            cleanup.callback(self.catalogue.close)
            self.calibrations = Calibrations(self.catalogue)
            self._allocated_nbytes = 0
            self._taken = TakenBytes(self.catalogue)
            if self.is_writable:
                self._numbers = count(self.catalogue.write(lambda view: begin_epoch(view, time.time())))
                self._uses = Uses(self._numbers)
            else:
                with self.catalogue.read() as view:
                    check_format(view)
            self.files = ExtentFiles(folder / "extents", writable=self.is_writable, read_map=self._read_folders)
            if self.is_writable:
                if config.extent_folders:
                    self._place(add_folders(self.files.folders, config.extent_folders))
                self.count_free_space()
            cleanup.pop_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold `mutation`; what ends with an error leaves free what the catalogue does not name.

        An interrupt may come right after a commit: only the catalogue knows then whether that took place. Whoever
        writes extents inside must have waited for all of it when the error leaves the `with` block.
        """
        with self.mutation:
            try:
                yield
            except BaseException:
                with suppress(KVStoreError):  # what cannot be counted stays taken, until the store is opened again
                    self.count_free_space()
                raise

    def count_free_space(self) -> None:
        """Take everything that the catalogue does not name for free, as at opening; called under `mutation`."""
        with self.catalogue.read() as view:
            self.allocator = ExtentAllocator(self.files, taken_extents(view), self._place)

    def next_number(self) -> int:
        """Draw a generation or a stamp: unique in the life of the store, and larger than all before."""
        return next(self._numbers)

    def next_numbers(self, count: int) -> list[int]:
        """Draw several, rising; see `next_number`."""
        return list(islice(self._numbers, count))

    def look_up(self, keys: Sequence[BlockKey], with_directory: Sequence[bool]) -> list[Found | KVStoreError | None]:
        """Find blocks in one short transaction.

        Args:
            keys: what to find.
            with_directory: per key, also return the record's header and plane directory.

        Returns:
            Per key: the block, None when it is not stored or in a folder that is away, or the error that its damaged
            entry caused.
        """
        found: list[Found | KVStoreError | None] = []
        with self.catalogue.read() as view:
            for key, wants_directory in zip(keys, with_directory, strict=True):
                try:
                    record = find_block(view, key)
                except KVStoreError as error:
                    found.append(error)
                    continue
                if record is None or self.files.is_away(record.extent.file_id):
                    found.append(None)
                    continue
                found.append(Found(record, find_directory(view, key) if wants_directory else None))
        return found

    def note_use(self, keys: Iterable[BlockKey]) -> None:
        """Remember that blocks were used; the next commit moves them behind all others in the order of eviction."""
        if self.is_writable:
            self._uses.note(keys)

    def allocate(self, sizes: Sequence[int], keep: Collection[BlockKey]) -> tuple[list[Extent], CapacityError | None]:
        """Hand out extents in order, evicting the least recently used blocks that no stream needs.

        Args:
            sizes: length of each, a multiple of the alignment.
            keep: blocks not to evict.

        Returns:
            The extents, and why they are fewer than asked for: budget or file system are full and nothing more may be
            evicted.
        """
        extents: list[Extent] = []
        try:
            while len(extents) < len(sizes):
                run = self.allocator.allocate_run(sizes[len(extents) :], self._extent_limit())
                if not run:
                    self._make_room(sizes[len(extents)], keep)
                extents += run
                self._allocated_nbytes += sum(extent.nbytes for extent in run)
        except CapacityError as error:
            return extents, error
        except BaseException:
            self.allocator.release(extents)
            raise
        return extents, None

    def commit(
        self,
        work: Callable[[WriteView], Sequence[Extent]],
        keep: Collection[BlockKey],
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the one transaction of a batch; in a full store it also makes the room that the next batch will want.

        Called under `mutation`.

        Args:
            work: changes the tables, and only them; returns the extents that are free once that is committed.
            keep: blocks not to evict.
            ready: called when all is done but the commit itself: returns when what `work` names is on the device, and
                may be called again.

        Raises:
            CapacityError: the catalogue cannot grow; nothing has changed.
            KVStoreError: what `work` or `ready` raised; nothing has changed.
        """
        self._commit(work, self._lack_nbytes(), keep, ready)

    def usage(self) -> DiskUsage:
        """Say where the bytes on disk are."""
        catalogue_nbytes = self.catalogue.nbytes
        if self.is_writable:
            return DiskUsage(self.allocator.used_nbytes, self.allocator.file_nbytes, catalogue_nbytes)
        return DiskUsage(self._taken.nbytes(), sum(self.files.sizes().values()), catalogue_nbytes)

    def close(self) -> None:
        """Give free tails of the extent files back, close everything, let the next writer in."""
        with ExitStack() as cleanup:
            if self.is_writable:
                cleanup.callback(self._lock.close)
            cleanup.callback(self.catalogue.close)
            cleanup.callback(self.files.close)
            if self.is_writable:
                self.allocator.trim(0)

    def _make_room(self, nbytes: int, keep: Collection[BlockKey]) -> None:
        """Evict in a commit of its own; `commit` evicts ahead, so that this is rare."""
        target_nbytes = min(eviction_target(nbytes, self.allocator.used_nbytes), max(nbytes, _MAX_EVICTION_NBYTES))
        if not self._commit(lambda view: [], target_nbytes, keep):
            raise CapacityError(f"{self.folder}: no room for {nbytes} bytes: {self._describe_lack(nbytes)}")

    def _commit(
        self,
        work: Callable[[WriteView], Sequence[Extent]],
        evict_nbytes: int,
        keep: Collection[BlockKey],
        ready: Callable[[], None] = lambda: None,
    ) -> int:
        uses = self._uses.take(_MAX_TOUCHES_PER_COMMIT)

        def run(view: WriteView) -> tuple[list[Extent], int]:
            for key, stamp in uses:
                touch(view, key, stamp)
            freed = list(work(view))
            idle: dict[BlockKey, BlockRecord] = {}
            candidates = islice(oldest_first(view, idle), _MAX_VICTIMS_PER_COMMIT + len(keep))
            # What is in a file that is not there makes no room, and may come back.
            here = (each for each in candidates if not self.allocator.is_absent(idle[each.key].extent.file_id))
            victims = choose_victims(here, target_nbytes=evict_nbytes, keep=keep)
            freed += [delete_block(view, victim.key, idle[victim.key]) for victim in victims]
            ready()
            return freed, len(victims)

        freed, num_evicted = self.catalogue.write(run)
        self.allocator.release(freed)
        self.meter.add(TierStats(evicted_blocks=num_evicted))
        return num_evicted

    def _lack_nbytes(self) -> int:
        """Bytes to evict now so that as much fits next as was allocated since the last commit."""
        limit = self._extent_limit()
        wanted, self._allocated_nbytes = self._allocated_nbytes, 0
        if limit is None or wanted > limit // _MOST_AHEAD:
            return 0  # the file system says when it is full; a small store is used to the last block
        return max(0, min(wanted, self.allocator.used_nbytes + wanted - limit))

    def _read_folders(self) -> FolderMap:
        with self.catalogue.read() as view:
            return read_folders(view)

    def _place(self, folders: FolderMap) -> None:
        self.catalogue.write(lambda view: write_folders(view, folders))
        self.files.use(folders)

    def _describe_lack(self, nbytes: int) -> str:
        """Say which is full, the budget or the file system."""
        limit = self._extent_limit()
        if limit is None or self.allocator.file_nbytes + nbytes <= limit:
            return describe_full(self.folder)
        usage = self.usage()
        return (
            f"{usage.total_nbytes} bytes taken, {usage.extent_used_nbytes} of them by blocks, "
            f"budget {self.config.disk_nbytes}; remove streams or raise the budget"
        )

    def _extent_limit(self) -> int | None:
        if self.config.disk_nbytes is None:
            return None
        return max(0, self.config.disk_nbytes - self.catalogue.nbytes - _CATALOGUE_GROWTH_NBYTES)
