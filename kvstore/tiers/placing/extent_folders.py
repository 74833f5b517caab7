# SPDX-License-Identifier: Apache-2.0
"""Folders for extents beside the store's own, on drives of their own: marked, so that an empty mount point is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.tiers.room import refusal
from kvstore.tiers.tables.folders import FolderMap

_MARK = "kvstore.folder"


def is_marked(folder: Path, store_id: str, number: int) -> bool:
    """Whether a folder is there and is that store's folder of that number."""
    return _read_mark(folder) == f"{store_id} {number}"


def add_folders(folders: FolderMap, paths: Sequence[Path]) -> FolderMap:
    """Take folders into use: new ones are made and marked; one that has moved is found by its mark.

    Raises:
        ConfigError: a folder belongs to another store.
        ReadOnlyError, CapacityError, StoreIOError: it cannot be made.
    """
    for path in paths:
        absolute = path.absolute()
        mark = _read_mark(absolute)
        if mark is None:
            folders = replace(folders, paths=(*folders.paths, str(absolute)))
            _make(absolute, f"{folders.store_id} {len(folders.paths)}")
            continue
        store_id, _, number = mark.partition(" ")
        if store_id != folders.store_id or not number.isdecimal() or not 1 <= int(number) <= len(folders.paths):
            raise ConfigError(f"{absolute}: it holds extents of another store; give every store folders of its own")
        listed = list(folders.paths)
        listed[int(number) - 1] = str(absolute)
        folders = replace(folders, paths=tuple(listed))
    return folders


def _read_mark(folder: Path) -> str | None:
    try:
        return (folder / _MARK).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _make(folder: Path, mark: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).write_text(mark + "\n", encoding="ascii")
    except OSError as error:
        raise refusal(folder, error) from error
