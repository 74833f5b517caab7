# SPDX-License-Identifier: Apache-2.0
"""Table `meta`: the folders that hold extent files, and which file lies in which."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, replace

from kvstore.errors import CorruptRecordError
from kvstore.tiers.catalogue import ReadView, Table, WriteView

_KEY = b"extent folders"
_MAX_FOLDERS = 256
_MAX_FILES = 1 << 20


@dataclass(frozen=True, slots=True)
class FolderMap:
    """Where extent files lie.

    Args:
        store_id: 32 hex digits, unique to the store: folders elsewhere carry it, so that none is taken for another's.
        paths: absolute, of the folders beside the store's own `extents/`, which is number 0.
        of_file: number of the folder of each file; files beyond the end are in folder 0.
    """

    store_id: str
    paths: tuple[str, ...] = ()
    of_file: tuple[int, ...] = ()

    def folder_of(self, file_id: int) -> int:
        """Number of the folder that holds a file."""
        return self.of_file[file_id] if file_id < len(self.of_file) else 0

    def with_file(self, file_id: int, folder: int) -> FolderMap:
        """The map with one more file."""
        listed = self.of_file + (0,) * (file_id + 1 - len(self.of_file))
        return replace(self, of_file=(*listed[:file_id], folder, *listed[file_id + 1 :]))


def new_folders() -> FolderMap:
    """The map of a new store."""
    return FolderMap(secrets.token_hex(16))


def read_folders(view: ReadView) -> FolderMap:
    """Return the map; a store of format 1.0 has one folder.

    Raises:
        CorruptRecordError: it is damaged.
    """
    value = view.get(Table.META, _KEY)
    if value is None:
        return FolderMap("")
    try:
        fields = json.loads(value)
        found = FolderMap(str(fields["store_id"]), tuple(fields["paths"]), tuple(fields["of_file"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptRecordError(f"extent folders: {error}") from error
    is_possible = (
        len(found.paths) < _MAX_FOLDERS
        and len(found.of_file) <= _MAX_FILES
        and all(isinstance(path, str) and path.startswith("/") and "\0" not in path for path in found.paths)
        and all(isinstance(number, int) and 0 <= number <= len(found.paths) for number in found.of_file)
    )
    if not is_possible:
        raise CorruptRecordError("extent folders: fields that no writer makes")
    return found


def write_folders(view: WriteView, folders: FolderMap) -> None:
    """Store the map."""
    view.put(Table.META, _KEY, json.dumps(asdict(folders), sort_keys=True, separators=(",", ":")).encode())
