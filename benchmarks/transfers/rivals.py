# SPDX-License-Identifier: Apache-2.0
"""What users would otherwise keep blocks in: values of LMDB, one file per block, safetensors, one mapped file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import lmdb
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from harness import check
from transfers.raw import Data

_FILE_THREADS = 8


class Rival(Protocol):
    """A way to keep numbered blocks of equal size. Writes are durable when they return."""

    def write(self, numbers: Sequence[int], blocks: Sequence[Data]) -> None:
        """Store blocks, over what was there."""
        ...

    def read(self, numbers: Sequence[int], into: Sequence[Data]) -> None:
        """Bring blocks."""
        ...

    def forget(self, numbers: Sequence[int]) -> None:
        """Drop blocks from the page cache, with all that would keep them there."""
        ...

    def close(self) -> None:
        """Close files and threads."""
        ...


def _drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LmdbValues:
    """One value a block, one transaction a batch; read through the map and copied out."""

    def __init__(self, folder: Path, map_nbytes: int) -> None:
        self._folder = folder
        self._map_nbytes = map_nbytes
        self._open()

    def write(self, numbers: Sequence[int], blocks: Sequence[Data]) -> None:
        """Put values and commit, which syncs."""
        with self._environment.begin(write=True) as transaction:
            for number, block in zip(numbers, blocks, strict=True):
                transaction.put(number.to_bytes(8, "big"), block.data)

    def read(self, numbers: Sequence[int], into: Sequence[Data]) -> None:
        """Copy values out of the map."""
        with self._environment.begin(buffers=True) as transaction:
            for number, target in zip(numbers, into, strict=True):
                value = transaction.get(number.to_bytes(8, "big"))
                check(value is not None, f"LMDB lost block {number}")
                target[:] = np.frombuffer(value or b"", dtype=np.uint8)

    def forget(self, numbers: Sequence[int]) -> None:
        """Mapped pages stay: unmap first."""
        self._environment.close()
        _drop(self._folder / "data.mdb")
        self._open()

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()

    def _open(self) -> None:
        self._environment = lmdb.open(str(self._folder), map_size=self._map_nbytes, readahead=False)


class BlockFiles:
    """One plain file a block, by several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._threads = ThreadPoolExecutor(_FILE_THREADS)

    def write(self, numbers: Sequence[int], blocks: Sequence[Data]) -> None:
        """Write and sync each file, then the folder."""
        list(self._threads.map(self._write_one, numbers, blocks))
        _sync(self._folder)

    def read(self, numbers: Sequence[int], into: Sequence[Data]) -> None:
        """Open, read, close."""
        list(self._threads.map(self._read_one, numbers, into))

    def forget(self, numbers: Sequence[int]) -> None:
        """Drop each file."""
        for number in numbers:
            _drop(self._path(number))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def _write_one(self, number: int, block: Data) -> None:
        with self._path(number).open("wb", buffering=0) as file:
            file.write(block.data)
            os.fsync(file.fileno())

    def _read_one(self, number: int, target: Data) -> None:
        with self._path(number).open("rb", buffering=0) as file:
            file.readinto(target.data)


class SafetensorsFiles(BlockFiles):
    """One safetensors file a block, by several threads."""

    def _write_one(self, number: int, block: Data) -> None:
        save_file({"kv": torch.from_numpy(block)}, self._path(number))
        _sync(self._path(number))

    def _read_one(self, number: int, target: Data) -> None:
        torch.from_numpy(target).copy_(load_file(self._path(number))["kv"])


class MappedFile:
    """All blocks in one file, mapped and copied."""

    def __init__(self, path: Path, block_nbytes: int, num_blocks: int) -> None:
        self._path = path
        self._block_nbytes = block_nbytes
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, block_nbytes * num_blocks)
        self._open()

    def write(self, numbers: Sequence[int], blocks: Sequence[Data]) -> None:
        """Copy into the map, and sync it."""
        for number, block in zip(numbers, blocks, strict=True):
            self._map[number * self._block_nbytes : (number + 1) * self._block_nbytes] = block.data
        self._map.flush()

    def read(self, numbers: Sequence[int], into: Sequence[Data]) -> None:
        """Copy out of the map."""
        view = np.frombuffer(self._map, dtype=np.uint8)
        for number, target in zip(numbers, into, strict=True):
            target[:] = view[number * self._block_nbytes : (number + 1) * self._block_nbytes]

    def forget(self, numbers: Sequence[int]) -> None:
        """Mapped pages stay: unmap first."""
        self._map.close()
        _drop(self._path)
        self._open()

    def close(self) -> None:
        """Unmap."""
        self._map.close()

    def _open(self) -> None:
        with self._path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
