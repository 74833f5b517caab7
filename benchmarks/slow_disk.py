# SPDX-License-Identifier: Apache-2.0
"""Runs programs on a disk that can be slowed down or stalled while they run, by the library in slow_disk.c."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("slow_disk.c")
_CONTROL = struct.Struct("=QQQ")


class SlowDisk:
    """The control of one such disk, in every process that uses it.

    Args:
        scratch: a folder for the library and the control file.
        folder: what lies below it is slow.
    """

    def __init__(self, scratch: Path, folder: Path) -> None:
        self._library = scratch / "slow_disk.so"
        self._path = scratch / "slow_disk.control"
        self._folder = folder
        if not self._path.exists():
            self._path.write_bytes(bytes(_CONTROL.size))
            compiler = os.environ.get("CC", "cc")
            subprocess.run(
                [compiler, "-O1", "-shared", "-fPIC", "-o", str(self._library), str(_SOURCE), "-ldl", "-lpthread"],
                check=True,
            )
        with self._path.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), _CONTROL.size)

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to be on that disk."""
        return {
            "LD_PRELOAD": str(self._library),
            "SLOW_DISK_CONTROL": str(self._path),
            "SLOW_DISK_FOLDER": str(self._folder.resolve()),
        }

    def set(self, *, write_rate: int = 0, writes_stall: bool = False, reads_stall: bool = False) -> None:
        """Limit all writes together to `write_rate` bytes per second, 0 for no limit; stall writes, or reads."""
        _CONTROL.pack_into(self._control, 0, write_rate, writes_stall, reads_stall)
