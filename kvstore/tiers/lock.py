# SPDX-License-Identifier: Apache-2.0
"""The one writer of a store: an advisory lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from kvstore.errors import BusyError, StoreIOError
from kvstore.tiers.extents import sync_folder
from kvstore.tiers.room import refusal


class WriterLock:
    """Holds `writer.lock` for as long as it is open; the file names the holder's process id for people.

    `flock` belongs to the open file, so the kernel lets go of it however the process ends. A forked child that keeps
    the descriptor keeps the lock, too; children started with `subprocess` do not get it.

    Raises:
        BusyError: another writer holds it; the message names its process.
        ReadOnlyError: the folder cannot be written.
        CapacityError: the file system is full.
        StoreIOError: the file cannot be opened or locked.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise refusal(path.parent, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise BusyError(f"{path.parent}: process {holder} writes this store; one writer at a time") from error
        except OSError as error:
            os.close(self._descriptor)
            raise StoreIOError(f"{path}: cannot be locked: {error.strerror}") from error
        with suppress(OSError):  # the lock is held; a full disk, which needs a writer to make room, may lack the name
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let the next writer in."""
        os.close(self._descriptor)


def claim_folder(folder: Path, *, is_durable: bool) -> WriterLock:
    """Make the folders of a store where they are missing, and be its writer.

    Args:
        folder: the store.
        is_durable: make what is new survive a power cut.

    Raises:
        BusyError, ReadOnlyError, CapacityError, StoreIOError: see `WriterLock`.
    """
    try:
        is_new = not folder.exists()
        for part in (folder, folder / "catalogue", folder / "extents"):
            part.mkdir(parents=True, exist_ok=True)
        if is_durable:
            sync_folder(folder)
            if is_new:  # who may write an old store need not be allowed to read the folder around it
                sync_folder(folder.parent)
    except OSError as error:
        raise refusal(folder, error) from error
    return WriterLock(folder / "writer.lock")
