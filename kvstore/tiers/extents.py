# SPDX-License-Identifier: Apache-2.0
"""Extent files: open handles, in the store's own folder and in others that may be away."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from kvstore.errors import StoreIOError
from kvstore.native import DirectFile
from kvstore.tiers.placing.extent_folders import is_marked
from kvstore.tiers.tables.folders import FolderMap


class ExtentFiles:
    """Open handles of a store's extent files, by file id; opened on first use, closed together. Thread-safe.

    A folder beside the store's own may be away: its files are not opened, not listed, and nothing is put there.

    Args:
        folder: the store's own, number 0; holds `00000000.extents`, `00000001.extents`, ...
        writable: open handles for writing.
        read_map: says where files lie; asked again for files that were not known.
    """

    def __init__(
        self, folder: Path, *, writable: bool, read_map: Callable[[], FolderMap] = lambda: FolderMap("")
    ) -> None:
        self._folder = folder
        self._writable = writable
        self._read_map = read_map
        self._lock = threading.Lock()
        self._files: dict[int, DirectFile] = {}
        self._unsynced: set[Path] = set()
        self.folders = read_map()
        self._asked_for: set[int] = set()  # files behind the map's end that a reader need not look up again
        self._present = self._find_present()

    def use(self, folders: FolderMap) -> None:
        """Go by a new map: the writer's, which has just been committed."""
        with self._lock:
            self.folders = folders
            self._present = self._find_present()

    def present(self) -> list[int]:
        """Numbers of the folders that are there, ascending; 0 always is."""
        return sorted(self._present)

    def is_away(self, file_id: int) -> bool:
        """Whether a file is in a folder that is not there."""
        return self._number(file_id) not in self._present

    def path(self, file_id: int) -> Path:
        """Where the file lies."""
        number = self._number(file_id)
        return self._folder_path(number) / f"{file_id:08d}.extents"

    def file(self, file_id: int, *, create: bool = False) -> DirectFile:
        """Return the open handle.

        Args:
            file_id: of the file.
            create: make a file that is missing; a file that blocks lie in and that is missing may come back, and must
                not find another one in its place.

        Raises:
            StoreIOError: the file is missing, its folder is away, or it cannot be opened.
        """
        with self._lock:
            found = self._files.get(file_id)
            if found is None:
                path = self.path(file_id)
                if self.is_away(file_id):
                    raise StoreIOError(f"{path}: the folder is not there")
                if not path.exists():
                    if not create:
                        raise StoreIOError(f"{path}: the file is missing")
                    self._unsynced.add(path.parent)
                found = DirectFile(str(path), self._writable)
                self._files[file_id] = found
            return found

    def sizes(self) -> dict[int, int]:
        """Bytes of every extent file that is there, by file id in ascending order."""
        sizes: dict[int, int] = {}
        for number in self._present:
            for path in self._folder_path(number).glob("*.extents"):
                if path.stem.isdigit() and self._number(int(path.stem)) == number:
                    sizes[int(path.stem)] = path.stat().st_size
        return dict(sorted(sizes.items()))

    def sync(self, file_ids: Iterable[int]) -> None:
        """Return when what was written to these files survives a power cut, new files included."""
        for file_id in sorted(set(file_ids)):
            self.file(file_id).sync()
        while self._unsynced:
            folder = next(iter(self._unsynced))
            sync_folder(folder)
            self._unsynced.discard(folder)

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

    def _number(self, file_id: int) -> int:
        if file_id >= len(self.folders.of_file) and file_id not in self._asked_for and not self._writable:
            known = self.folders
            self.folders = self._read_map()  # the writer may have added files, and folders, since
            self._asked_for.add(file_id)
            if self.folders.paths != known.paths:
                self._present = self._find_present()
        return self.folders.folder_of(file_id)

    def _folder_path(self, number: int) -> Path:
        return self._folder if number == 0 else Path(self.folders.paths[number - 1])

    def _find_present(self) -> frozenset[int]:
        numbers = range(1, len(self.folders.paths) + 1)
        there = {n for n in numbers if is_marked(self._folder_path(n), self.folders.store_id, n)}
        return frozenset({0, *there})


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
