# SPDX-License-Identifier: Apache-2.0
"""What the file system under a store refuses, and how much room it has left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from kvstore.errors import CapacityError, KVStoreError, ReadOnlyError, StoreIOError

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY_ERRNOS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# No single request comes near this: whoever is refused with so much free has met a quota.
_MORE_THAN_ASKED_NBYTES = 4 << 30


def free_nbytes(folder: Path) -> int | None:
    """Bytes that this user may still write to the file system of `folder`, there or not; None when it does not say.

    A quota may leave the user less.
    """
    try:
        status = os.statvfs(next(each for each in (folder, *folder.absolute().parents) if os.access(each, os.F_OK)))
    except OSError:
        return None
    # Part of the free blocks may be kept back for the superuser.
    return (status.f_bfree if os.geteuid() == 0 else status.f_bavail) * status.f_frsize


def describe_full(folder: Path) -> str:
    """Say that the file system of `folder` is full, or the user's quota on it, and what to do."""
    nbytes = free_nbytes(folder)
    if nbytes is not None and nbytes >= _MORE_THAN_ASKED_NBYTES:
        return f"a quota on the file system is used up, {nbytes} bytes free; remove streams or raise the quota"
    free = "" if nbytes is None else f", {nbytes} bytes free"
    return f"the file system is full{free}; remove streams or make room on it"


def refusal(folder: Path, error: OSError) -> KVStoreError:
    """Translate what the file system said when a writer tried to create or to open the store `folder`.

    Returns:
        The error to raise: `ReadOnlyError`, `CapacityError`, or `StoreIOError` for everything else.
    """
    if error.errno in READ_ONLY_ERRNOS:
        is_store = os.access(folder / "catalogue" / "data.mdb", os.F_OK)  # Path.exists may raise here
        advice = "open the store for reading" if is_store else "no store can be made here"
        return ReadOnlyError(f"{folder}: {error.strerror}; {advice}")
    if error.errno in FULL_ERRNOS:
        return CapacityError(f"{folder}: {describe_full(folder)}")
    return StoreIOError(f"{folder}: cannot be a store: {error.strerror}")


def reserve(path: Path, nbytes: int) -> None:
    """Give a file that is shorter than `nbytes` that length, every byte backed by the file system.

    A file that is to be mapped needs it: touching a page that a full file system cannot back kills with SIGBUS. A file
    that is long enough is not even opened: closing it would drop the POSIX locks this process may hold on it.

    Raises:
        CapacityError: there is no room.
        ReadOnlyError: it may not be created.
        StoreIOError: the operating system refused.
    """
    try:
        if path.exists() and path.stat().st_size >= nbytes:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise refusal(path.parent.parent, error) from error
