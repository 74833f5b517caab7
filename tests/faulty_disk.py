# SPDX-License-Identifier: Apache-2.0
"""The control of faulty_disk.c: what goes wrong, from now on, in every process that was started with it."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")
_CONTROL = struct.Struct("=12Q")
EIO, ENOSPC, EROFS = errno.EIO, errno.ENOSPC, errno.EROFS


def build(scratch: Path) -> dict[str, str]:
    """Compile the library; returns the environment that a process needs to have its faults."""
    library, control = scratch / "faulty_disk.so", scratch / "faulty_disk.control"
    control.write_bytes(bytes(_CONTROL.size))
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, _SOURCE, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "FAULTY_DISK_CONTROL": str(control)}


@contextmanager
def faults(
    *,
    extents: bool = False,
    catalogue: bool = False,
    read_errno: int = 0,
    write_errno: int = 0,
    sync_errno: int = 0,
    is_short: bool = False,
    read_stall_ms: int = 0,
    write_stall_ms: int = 0,
    sync_stall_ms: int = 0,
    end_at: int = 0,
    loses: int = 0,
    is_fickle: bool = False,
) -> Iterator[None]:
    """Let transfers of extent files, of the catalogue, or both go wrong inside the `with` block.

    With `end_at` the process is killed before so many writes and syncs. With `loses` what is not synced by then is
    lost, as in a power cut: all of it (1), or some of it, chosen by that number. With `is_fickle` rings do all that a
    kernel may: submissions are taken in part, calls interrupted or put off, transfers ended by EINTR or EAGAIN.
    """
    path = Path(os.environ["FAULTY_DISK_CONTROL"])
    with path.open("r+b") as file, mmap.mmap(file.fileno(), _CONTROL.size) as control:
        stalls = (read_stall_ms, write_stall_ms, sync_stall_ms)
        _CONTROL.pack_into(
            control,
            0,
            *(extents, catalogue, read_errno, write_errno, sync_errno, is_short),
            *(*stalls, end_at, loses, is_fickle),
        )
        try:
            yield
        finally:
            _CONTROL.pack_into(control, 0, *[0] * 12)
