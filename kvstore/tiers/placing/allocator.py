# SPDX-License-Identifier: Apache-2.0
"""Hands out extents and takes them back: first fit in files that grow in steps, the folders taking turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate, groupby

from kvstore.errors import CapacityError, CorruptRecordError, StoreIOError
from kvstore.layout import ALIGNMENT
from kvstore.tiers.base import Extent
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.placing.free_space import FreeSpace
from kvstore.tiers.tables.folders import FolderMap

MIN_STEP_NBYTES = 1 << 20
MAX_STEP_NBYTES = 256 << 20
MAX_FILE_NBYTES = 64 << 30
STRIPE_NBYTES = 4 << 20
"""So much goes to one folder before the next one's turn: neighbours are still read together, large batches by all."""


class ExtentAllocator:
    """Hands out extents and takes them back; grows the files in steps. The writer owns the only one. Thread-safe.

    Nothing of it is stored: at open, everything that the catalogue does not name is free, so a crash leaks nothing.

    Args:
        files: where the extents lie.
        allocated: the extents that the catalogue names, in disk order.
        place: makes a map of files and folders known for good, before a file is made in one of several folders.
    """

    def __init__(
        self,
        files: ExtentFiles,
        allocated: Iterable[Extent],
        place: Callable[[FolderMap], None] = lambda folders: None,
    ) -> None:
        self._files = files
        self._place = place
        self._handed_out_nbytes = 0
        self._lock = threading.Lock()
        sizes = files.sizes()
        present = frozenset(sizes)
        self._spaces: dict[int, FreeSpace] = {}
        for file_id, extents in groupby(allocated, key=lambda extent: extent.file_id):
            size = _whole_pages(sizes.pop(file_id, 0))
            self._spaces[file_id] = FreeSpace.around(((e.offset, e.nbytes) for e in extents), size)
        for file_id, size in sizes.items():
            self._spaces[file_id] = FreeSpace(_whole_pages(size))
        self._spaces = dict(sorted(self._spaces.items()))
        self._absent = self._spaces.keys() - present

    @property
    def used_nbytes(self) -> int:
        """Bytes handed out, in files that are there."""
        with self._lock:
            return sum(space.used_nbytes for file_id, space in self._spaces.items() if file_id not in self._absent)

    @property
    def file_nbytes(self) -> int:
        """Length of all files that are there."""
        with self._lock:
            return self._file_nbytes()

    def is_absent(self, file_id: int) -> bool:
        """Whether a file that extents lie in was not there when the store was opened: nothing is put in its place."""
        return file_id in self._absent

    def lengths(self) -> dict[int, int]:
        """Return every file's length, as the allocator knows it."""
        with self._lock:
            return {file_id: space.nbytes for file_id, space in self._spaces.items()}

    def free_ranges(self) -> dict[int, list[tuple[int, int]]]:
        """Return every file's free (offset, nbytes), sorted."""
        with self._lock:
            return {file_id: space.ranges() for file_id, space in self._spaces.items()}

    def allocate(self, nbytes: int, limit_nbytes: int | None) -> Extent | None:
        """Hand out an extent of `nbytes` (a multiple of the alignment), growing a file where needed.

        Args:
            nbytes: length.
            limit_nbytes: most bytes that all files may have together; None for no limit.

        Returns:
            The extent; None when neither the limit nor the file system leaves room.
        """
        return next(iter(self.allocate_run([nbytes], limit_nbytes)), None)

    def allocate_run(self, sizes: Sequence[int], limit_nbytes: int | None) -> list[Extent]:
        """Hand out as many extents as find a place one behind the other; see `allocate`.

        Args:
            sizes: length of each, at least one.
            limit_nbytes: as in `allocate`.

        Returns:
            Extents of the first sizes, at least one; [] when there is no room.
        """
        assert not any(nbytes % ALIGNMENT for nbytes in sizes), f"extents of {sizes} bytes"
        with self._lock:
            present = self._files.present()
            if len(present) > 1:
                sizes = self._until_next_turn(sizes)
            found = self._allocate_in_turn(present, sizes, limit_nbytes)
            self._handed_out_nbytes += sum(extent.nbytes for extent in found)
            return found

    def allocate_before(self, extent: Extent) -> Extent | None:
        """Hand out as many bytes nearer to the front of its folder than `extent`; None when no hole there has them."""
        with self._lock:
            for file_id, space in self._before(extent):
                offset = space.allocate(extent.nbytes, extent.offset if file_id == extent.file_id else None)
                if offset is not None:
                    return Extent(file_id, offset, extent.nbytes)
            return None

    def has_hole_before(self, extent: Extent) -> bool:
        """Whether anything nearer to the front of its folder than `extent` is free."""
        with self._lock:
            return any(
                space.first_free is not None and (file_id, space.first_free) < (extent.file_id, extent.offset)
                for file_id, space in self._before(extent)
            )

    def release(self, extents: Iterable[Extent]) -> None:
        """Take extents back, after the commit that stopped naming them."""
        with self._lock:
            for extent in extents:
                # In a damaged catalogue two blocks may claim one place. It stays taken until the next open, and
                # verify reports it; freeing it would give it to a third.
                with suppress(CorruptRecordError, KeyError):
                    self._spaces[extent.file_id].release(extent.offset, extent.nbytes)

    def trim(self, least_nbytes: int) -> None:
        """Give free tails of at least `least_nbytes` back to the file system; what it does not take stays free.

        A reader of an extent that was there sees a short file, looks again, and misses.
        """
        with self._lock:
            for file_id, space in self._spaces.items():
                if space.tail_nbytes >= max(least_nbytes, ALIGNMENT) and file_id not in self._absent:
                    with suppress(StoreIOError):
                        self._files.shorten(file_id, space.nbytes - space.tail_nbytes)
                        space.cut_tail()

    def _allocate_in_turn(self, present: Sequence[int], sizes: Sequence[int], limit_nbytes: int | None) -> list[Extent]:
        """Try folders in order: each takes its share of what is written before it is the next one's turn."""
        first = self._handed_out_nbytes // STRIPE_NBYTES % len(present)
        for folder in (*present[first:], *present[:first]):
            for file_id, space in self._spaces.items():
                if file_id not in self._absent and self._files.folders.folder_of(file_id) == folder:
                    found = space.allocate_run(sizes)
                    if found is not None:
                        offset, count = found
                        ends = list(accumulate(sizes[:count], initial=offset))
                        return [Extent(file_id, *each) for each in zip(ends, sizes[:count], strict=False)]
            grown = self._allocate_grown(sizes[0], limit_nbytes, folder)
            if grown is not None:
                return [grown]
        return []

    def _until_next_turn(self, sizes: Sequence[int]) -> Sequence[int]:
        """Those of the sizes that begin before it is another folder's turn."""
        begins = accumulate(sizes, initial=self._handed_out_nbytes % STRIPE_NBYTES)
        return sizes[: sum(1 for begin, _ in zip(begins, sizes, strict=False) if begin < STRIPE_NBYTES)]

    def _before(self, extent: Extent) -> list[tuple[int, FreeSpace]]:
        """Files of the same folder up to that of `extent`."""
        folder_of = self._files.folders.folder_of
        return [
            (file_id, space)
            for file_id, space in self._spaces.items()
            if file_id <= extent.file_id
            and file_id not in self._absent
            and folder_of(file_id) == folder_of(extent.file_id)
        ]

    def _file_nbytes(self) -> int:
        return sum(space.nbytes for file_id, space in self._spaces.items() if file_id not in self._absent)

    def _last_file(self, folder: int) -> tuple[int, FreeSpace]:
        """The last file of a folder, or a new one."""
        folders = self._files.folders
        ids = [each for each in self._spaces if each not in self._absent and folders.folder_of(each) == folder]
        if ids:
            return ids[-1], self._spaces[ids[-1]]
        return self._new_file_id(), FreeSpace()

    def _new_file_id(self) -> int:
        return max([*self._spaces, len(self._files.folders.of_file) - 1], default=-1) + 1

    def _allocate_grown(self, nbytes: int, limit_nbytes: int | None, folder: int) -> Extent | None:
        file_id, space = self._last_file(folder)
        if space.nbytes - space.tail_nbytes + nbytes > MAX_FILE_NBYTES:
            file_id, space = self._new_file_id(), FreeSpace()
        lacking = nbytes - space.tail_nbytes
        comfortable = max(lacking, min(max(space.nbytes, MIN_STEP_NBYTES), MAX_STEP_NBYTES))
        present = self._file_nbytes()
        for step in (comfortable, lacking):
            if limit_nbytes is not None and present + step > limit_nbytes:
                continue
            try:
                if file_id not in self._spaces and self._files.folders.paths:
                    self._place(self._files.folders.with_file(file_id, folder))
                self._files.file(file_id, create=True).preallocate(space.nbytes + step)
            except CapacityError:
                continue
            self._spaces[file_id] = space
            space.extend(space.nbytes + step)
            offset = space.allocate(nbytes)
            assert offset is not None, "a grown file has room"
            return Extent(file_id, offset, nbytes)
        return None


def _whole_pages(nbytes: int) -> int:
    return nbytes // ALIGNMENT * ALIGNMENT
