# SPDX-License-Identifier: Apache-2.0
"""Disk to host and host to disk by size and depth: the package's pool beside a native loop that does nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harness import Report, check
from kvstore.native import Arena, DirectFile, IoPool
from transfers.raw import Data, Offsets, RawFile
from transfers.rounds import Call, rounds

Move = Callable[[Offsets], None]
RawMove = Callable[..., None]

_CALL_NBYTES = 64 << 20
_DEPTHS = (1, 8, 32)


def _count(size: int, depth: int) -> int:
    return max(4, min(64 * max(depth, 2), _CALL_NBYTES // size))


class Matrix:
    """One file of noise, larger than what a call moves, and both ways to it."""

    def __init__(self, report: Report, library: ctypes.CDLL, folder: Path, place: str, *, is_quick: bool) -> None:
        self._report = report
        self._place = place
        self._least, self._most_s = (5, 0.2) if is_quick else (15, 1.0)
        self._sizes = [16 << 10, 1 << 20] if is_quick else [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]
        self._nbytes = (256 << 20) if is_quick else (1 << 30)
        self._chance = np.random.default_rng(7)
        self._path = folder / "noise"
        self._noise = self._chance.integers(0, 256, _CALL_NBYTES, dtype=np.uint8)
        with self._path.open("wb") as file:
            for _ in range(self._nbytes // _CALL_NBYTES):
                file.write(self._noise.data)
        self._raw = RawFile(library, self._path, _CALL_NBYTES)
        self._has_uring = self._raw.has_uring()
        self._arena = Arena(_CALL_NBYTES, False)
        self._memory: Data = np.frombuffer(memoryview(self._arena), dtype=np.uint8)
        self._memory[:] = 1
        self._file = DirectFile(self._path, True)

    def run(self) -> None:
        """Measure all cells: reads first, since writes leave other bytes."""
        for is_write in (False, True):
            for size in self._sizes:
                for depth in _DEPTHS:
                    with closing(IoPool(depth, depth=depth)) as pool:
                        self._cell(pool, size, depth, is_write=is_write)

    def close(self) -> None:
        """Close and delete the file."""
        self._raw.close()
        self._file.close()
        self._path.unlink()

    def _cell(self, pool: IoPool, size: int, depth: int, *, is_write: bool) -> None:
        count = _count(size, depth)

        def ours(offsets: Offsets) -> None:
            ops = [(offset, number * size, size) for number, offset in enumerate(offsets.tolist())]
            move = pool.write if is_write else pool.read
            if depth == 1:
                for op in ops:
                    move(self._file, self._arena, [op])
            else:
                move(self._file, self._arena, ops)
            if is_write:
                self._file.sync()

        def raw(offsets: Offsets, *, is_uring: bool) -> None:
            self._raw.move(offsets, size, depth, is_write=is_write, is_uring=is_uring)
            if is_write:
                self._raw.sync()

        (self._verify_writes if is_write else self._verify_reads)(size, count, ours, raw)
        calls = {f"IoPool, {pool.engine}": Call(lambda: ours(self._places(size, count)))}
        calls["O_DIRECT, threads"] = Call(lambda: raw(self._places(size, count), is_uring=False))
        if self._has_uring:
            calls["O_DIRECT, io_uring"] = Call(lambda: raw(self._places(size, count), is_uring=True))
        timings = rounds(calls, least=self._least, most_s=self._most_s)
        limit = min((name for name in calls if name.startswith("O_")), key=lambda name: timings[name].median_s)
        case: dict[str, Any] = {
            "way": "host->disk" if is_write else "disk->host",
            "size": size,
            "depth": depth,
            "cold": "O_DIRECT, then fdatasync" if is_write else "O_DIRECT",
            "direct": self._raw.is_direct,
            "place": self._place,
        }
        for name in calls:
            if name != limit:
                found, against = (name, timings[name]), (limit, timings[limit])
                self._report.rate("transfer", count * size / 1e9, "GB/s", found, against, **case)

    def _places(self, size: int, count: int) -> Offsets:
        """Distinct random places."""
        return (self._chance.permutation(self._nbytes // size)[:count] * size).astype(np.uint64)

    def _verify_reads(self, size: int, count: int, ours: Move, raw: RawMove) -> None:
        offsets = self._places(size, count)
        expected = np.concatenate([self._noise[start : start + size] for start in (offsets % _CALL_NBYTES).tolist()])
        for memory, move in ((self._memory, ours), (self._raw.memory, partial(raw, is_uring=False))):
            memory[: expected.nbytes] = 0
            move(offsets)
            check(bool((memory[: expected.nbytes] == expected).all()), f"reads of {size} bytes")

    def _verify_writes(self, size: int, count: int, ours: Move, raw: RawMove) -> None:
        """What one writes, the page cache shows."""
        for memory, move in ((self._memory, ours), (self._raw.memory, partial(raw, is_uring=False))):
            offsets, nbytes = self._places(size, count), count * size
            memory[:nbytes] = self._chance.integers(0, 256, nbytes, dtype=np.uint8)
            move(offsets)
            with self._path.open("rb") as file:
                for number, offset in enumerate(offsets.tolist()):
                    file.seek(offset)
                    found = np.frombuffer(file.read(size), dtype=np.uint8)
                    check(bool((found == memory[number * size :][:size]).all()), f"writes of {size} bytes")
