# SPDX-License-Identifier: Apache-2.0
"""DirectFile: opening, growing, syncing and closing; the buffered fall-back; full disks."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import CapacityError, ConfigError, StoreIOError
from kvstore.native import Arena, DirectFile, IoPool

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def pool(engine: str) -> Iterator[IoPool]:
    """Both engines, where this system has both."""
    pool = IoPool(2, engine)
    yield pool
    pool.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def arena_of(data: bytes) -> Arena:
    arena = Arena(len(data), pinned=False)
    memoryview(arena)[: len(data)] = data
    return arena


def noise(nbytes: int) -> bytes:
    return os.urandom(nbytes)


def test_a_missing_file_is_named_with_its_errno(tmp_path: Path) -> None:
    with pytest.raises(StoreIOError, match="absent") as caught:
        DirectFile(str(tmp_path / "absent"), writable=False)
    assert caught.value.errno == errno.ENOENT


def test_a_writable_file_is_created_and_never_truncated(tmp_path: Path) -> None:
    path = tmp_path / "data"
    DirectFile(str(path), writable=True).close()
    path.write_bytes(b"kept")

    assert DirectFile(str(path), writable=True).size() == 4


def test_files_without_o_direct_work_buffered_at_any_offset(pool: IoPool) -> None:
    # procfs refuses O_DIRECT with EINVAL, and every Linux has it.
    file = DirectFile("/proc/self/status", writable=False)
    buffer = bytearray(8)

    pool.submit_read(file, buffer, [(0, 1, 5)]).wait()

    assert not file.is_direct
    assert bytes(buffer) == b"\0Name:\0\0"


def test_a_full_disk_is_a_capacity_error_on_write_and_preallocation(tiny_disk: Path, pool: IoPool) -> None:
    file = DirectFile(str(tiny_disk / "data"), writable=True)

    with pytest.raises(CapacityError):
        file.preallocate(2 * MIB)
    assert file.size() == 0
    with pytest.raises(CapacityError):
        pool.submit_write(file, Arena(2 * MIB, pinned=False), [(0, 0, 2 * MIB)]).wait()


def test_preallocation_grows_a_file_and_keeps_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"kept")
    file = DirectFile(str(tmp_path / "data"), writable=True)

    file.preallocate(MIB)
    file.preallocate(PAGE)

    assert file.size() == MIB
    assert (tmp_path / "data").read_bytes()[:4] == b"kept"


def test_a_file_syncs_drops_its_cache_and_refuses_after_close(tmp_path: Path, pool: IoPool) -> None:
    file = DirectFile(str(tmp_path / "data"), writable=True)
    pool.submit_write(file, arena_of(noise(PAGE)), [(0, 0, PAGE)]).wait()
    file.sync()
    file.drop_cache()
    file.close()
    file.close()

    for call in (file.size, file.sync, lambda: pool.submit_read(file, Arena(PAGE, pinned=False), [(0, 0, PAGE)])):
        with pytest.raises(ConfigError, match="closed"):
            call()
