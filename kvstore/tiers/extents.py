# SPDX-License-Identifier: Apache-2.0
"""Extent files: open handles, preallocation in steps, and who owns which bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from kvstore.errors import CapacityError, CorruptRecordError, StoreIOError
from kvstore.layout import ALIGNMENT
from kvstore.native import DirectFile
from kvstore.tiers.base import Extent
from kvstore.tiers.free_space import FreeSpace

MIN_STEP_NBYTES = 1 << 20
MAX_STEP_NBYTES = 256 << 20
MAX_FILE_NBYTES = 64 << 30


class ExtentFiles:
    """Open handles of a store's extent files, by file id; opened on first use, closed together. Thread-safe.

    Args:
        folder: holds `00000000.extents`, `00000001.extents`, ...
        writable: open handles for writing; missing files are created.
    """

    def __init__(self, folder: Path, *, writable: bool) -> None:
        self._folder = folder
        self._writable = writable
        self._lock = threading.Lock()
        self._files: dict[int, DirectFile] = {}
        self._has_new_file = False

    def path(self, file_id: int) -> Path:
        """Where the file lies."""
        return self._folder / f"{file_id:08d}.extents"

    def file(self, file_id: int) -> DirectFile:
        """Return the open handle.

        Raises:
            StoreIOError: the file is missing or cannot be opened.
        """
        with self._lock:
            found = self._files.get(file_id)
            if found is None:
                self._has_new_file |= self._writable and not self.path(file_id).exists()
                found = DirectFile(str(self.path(file_id)), self._writable)
                self._files[file_id] = found
            return found

    def sizes(self) -> dict[int, int]:
        """Bytes of every extent file in the folder, by file id in ascending order."""
        paths = sorted(self._folder.glob("*.extents"))
        return {int(path.stem): path.stat().st_size for path in paths if path.stem.isdigit()}

    def sync(self, file_ids: Iterable[int]) -> None:
        """Return when what was written to these files survives a power cut, new files included."""
        for file_id in sorted(set(file_ids)):
            self.file(file_id).sync()
        if self._has_new_file:
            sync_folder(self._folder)
            self._has_new_file = False

    def shorten(self, file_id: int, nbytes: int) -> None:
        """Give everything behind the first `nbytes` bytes back to the file system.

        Raises:
            StoreIOError: the file system refused.
        """
        path = self.path(file_id)
        try:
            os.truncate(path, nbytes)
        except OSError as error:
            raise StoreIOError(f"{path}: cannot be cut to {nbytes} bytes: {error.strerror}") from error

    def close(self) -> None:
        """Close all handles."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()


class ExtentAllocator:
    """Hands out extents and takes them back; grows the files in steps. The writer owns the only one. Thread-safe.

    Nothing of it is stored: at open, everything that the catalogue does not name is free, so a crash leaks nothing.

    Args:
        files: where the extents lie.
        allocated: the extents that the catalogue names, in disk order.
    """

    def __init__(self, files: ExtentFiles, allocated: Iterable[Extent]) -> None:
        self._files = files
        self._lock = threading.Lock()
        sizes = files.sizes()
        self._spaces: dict[int, FreeSpace] = {}
        for file_id, extents in groupby(allocated, key=lambda extent: extent.file_id):
            size = _whole_pages(sizes.pop(file_id, 0))
            self._spaces[file_id] = FreeSpace.around(((e.offset, e.nbytes) for e in extents), size)
        for file_id, size in sizes.items():
            self._spaces[file_id] = FreeSpace(_whole_pages(size))
        self._spaces = dict(sorted(self._spaces.items()))

    @property
    def used_nbytes(self) -> int:
        """Bytes handed out."""
        with self._lock:
            return sum(space.used_nbytes for space in self._spaces.values())

    @property
    def file_nbytes(self) -> int:
        """Length of all files."""
        with self._lock:
            return sum(space.nbytes for space in self._spaces.values())

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
        assert nbytes % ALIGNMENT == 0, f"extent of {nbytes} bytes"
        with self._lock:
            for file_id, space in self._spaces.items():
                offset = space.allocate(nbytes)
                if offset is not None:
                    return Extent(file_id, offset, nbytes)
            return self._allocate_grown(nbytes, limit_nbytes)

    def allocate_before(self, extent: Extent) -> Extent | None:
        """Hand out as many bytes nearer to the front than `extent`; None when no hole there has them."""
        with self._lock:
            for file_id, space in self._spaces.items():
                if file_id > extent.file_id:
                    break
                offset = space.allocate(extent.nbytes, extent.offset if file_id == extent.file_id else None)
                if offset is not None:
                    return Extent(file_id, offset, extent.nbytes)
            return None

    def has_hole_before(self, extent: Extent) -> bool:
        """Whether anything nearer to the front than `extent` is free."""
        with self._lock:
            for file_id, space in self._spaces.items():
                first = space.first_free
                if first is not None and (file_id, first) < (extent.file_id, extent.offset):
                    return True
            return False

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
                if space.tail_nbytes >= max(least_nbytes, ALIGNMENT):
                    with suppress(StoreIOError):
                        self._files.shorten(file_id, space.nbytes - space.tail_nbytes)
                        space.cut_tail()

    def _allocate_grown(self, nbytes: int, limit_nbytes: int | None) -> Extent | None:
        file_id, space = next(reversed(self._spaces.items()), (0, FreeSpace()))
        if space.nbytes - space.tail_nbytes + nbytes > MAX_FILE_NBYTES:
            file_id, space = file_id + 1, FreeSpace()
        lacking = nbytes - space.tail_nbytes
        comfortable = max(lacking, min(max(space.nbytes, MIN_STEP_NBYTES), MAX_STEP_NBYTES))
        present = sum(each.nbytes for each in self._spaces.values())
        for step in (comfortable, lacking):
            if limit_nbytes is not None and present + step > limit_nbytes:
                continue
            try:
                self._files.file(file_id).preallocate(space.nbytes + step)
            except CapacityError:
                continue
            self._spaces[file_id] = space
            space.extend(space.nbytes + step)
            offset = space.allocate(nbytes)
            assert offset is not None, "a grown file has room"
            return Extent(file_id, offset, nbytes)
        return None


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole_pages(nbytes: int) -> int:
    return nbytes // ALIGNMENT * ALIGNMENT
