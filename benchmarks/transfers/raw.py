# SPDX-License-Identifier: Apache-2.0
"""The limit: a native loop of equal transfers at a fixed depth, past the page cache, without the package."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

_SOURCE: Final = Path(__file__).with_name("raw_transfers.cpp")
_HUGE_PAGE: Final = 2 << 20

Offsets = npt.NDArray[np.uint64]
Data = npt.NDArray[np.uint8]


def build(folder: Path) -> ctypes.CDLL:
    """Compile the loop; stops where there is no compiler, which the package's build needs too."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        sys.exit("bench io measures the limit with a C++ loop and found no compiler: install g++, or set CXX")
    library = folder / "raw_transfers.so"
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_uint64
    loaded.raw_transfer.argtypes = [
        *(ctypes.c_int, pointer, pointer, number, number, ctypes.c_uint, ctypes.c_int, ctypes.c_int)
    ]
    return loaded


class RawFile:
    """One file, and memory in huge pages to move its bytes from and to.

    Args:
        library: from `build`.
        path: opened with O_DIRECT where the file system has it (`is_direct`).
        memory_nbytes: most bytes of one call.
    """

    def __init__(self, library: ctypes.CDLL, path: Path, memory_nbytes: int) -> None:
        self._library = library
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
            self.is_direct = True
        except OSError:  # a file system without O_DIRECT, such as an old tmpfs
            self._descriptor = os.open(path, os.O_RDWR)
            self.is_direct = False
        self._map = mmap.mmap(-1, memory_nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._map, dtype=np.uint8)
        skipped = -whole.ctypes.data % _HUGE_PAGE
        self.memory: Data = whole[skipped : skipped + memory_nbytes]
        self.memory[:] = 1

    def move(self, offsets: Offsets, nbytes: int, depth: int, *, is_write: bool = False, is_uring: bool) -> None:
        """Move `nbytes` at each offset, one behind the other in memory, `depth` at a time."""
        result = self._library.raw_transfer(
            self._descriptor,
            self.memory.ctypes.data,
            offsets.ctypes.data,
            len(offsets),
            nbytes,
            depth,
            is_write,
            is_uring,
        )
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def has_uring(self) -> bool:
        """Whether the kernel lets this process have an io_uring."""
        try:
            self.move(np.zeros(1, np.uint64), mmap.PAGESIZE, 1, is_uring=True)
        except OSError:
            return False
        return True

    def sync(self) -> None:
        """Wait until what was written survives a power cut."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
