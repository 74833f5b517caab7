# SPDX-License-Identifier: Apache-2.0
"""Places that are full or may not be written: the error says which, and nothing that is stored is damaged."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.errors import CapacityError, KVStoreError, ReadOnlyError, StoreIOError
from kvstore.store import Access, Outcome, Store
from kvstore.tiers.catalogue import Catalogue, Table, WriteView
from kvstore.tiers.lock import WriterLock
from kvstore.tiers.room import describe_full, reserve
from tests.store_blocks import EXTENT_NBYTES, HEADER, block_key, make_blocks, make_slot, open_store, requests_for


def _append_until_full(store: Store, limit: int, expected: str) -> int:
    """Append single blocks until the store is full and says `expected`; returns how many are durable."""
    store.create_stream(HEADER)
    for index in range(limit):
        store.append("lecture", make_blocks(1, index), {"next": index + 1})
        try:
            store.flush()
        except CapacityError as error:
            said = str(error)
            break
    else:
        pytest.fail(f"{limit} blocks fit")
    assert expected in said
    return len(store.manifest("lecture").entries)


def test_a_stream_beyond_the_budget_is_a_capacity_error_and_nothing_is_damaged(tmp_path: Path) -> None:
    with open_store(tmp_path, disk_nbytes=(1 << 19) + 4 * EXTENT_NBYTES) as store:
        count = _append_until_full(store, 100, "raise the budget")
        assert count >= 4
        assert store.manifest("lecture").cursor == {"next": count}
        assert store.verify().is_clean
        store.create_stream(replace(HEADER, name="next"))
        assert store.remove_stream("lecture") == count * EXTENT_NBYTES
        store.append("next", make_blocks(count), {})
        store.flush()
    with open_store(tmp_path) as store:
        assert store.fetch(requests_for(make_blocks(count))).outcomes == [Outcome.DISK] * count
        assert store.verify().is_clean


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs privileges")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_file_system_is_a_capacity_error_and_nothing_is_damaged(small_disk: Path) -> None:
    with open_store(small_disk) as store:
        count = _append_until_full(store, 200, "the file system is full, ")
        assert count > 10
        assert store.verify().is_clean
        assert store.put([block_key(900)], [make_slot(900)], [40]) == [Outcome.FULL]
        assert store.fetch(requests_for(make_blocks(count))).outcomes.count(Outcome.DAMAGED) == 0
    with open_store(small_disk) as store:
        assert len(store.manifest("lecture").entries) == count
        store.remove_stream("lecture")
        assert store.put([block_key(900)], [make_slot(900)], [40]) == [Outcome.STORED]


def _leave_free(folder: Path, nbytes: int) -> Path:
    """Fill the file system but for `nbytes`; returns what to delete."""
    status = os.statvfs(folder)
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bfree * status.f_frsize - nbytes)
    return ballast


@pytest.mark.parametrize("with_budget", [False, True])
def test_a_budget_is_not_blamed_for_a_full_file_system(small_disk: Path, with_budget: bool) -> None:
    with open_store(small_disk, disk_nbytes=1 << 30 if with_budget else None) as store:
        _append_until_full(store, 200, "the file system is full, ")


def test_a_full_file_system_makes_no_store_and_kills_nobody(small_disk: Path) -> None:
    for nbytes in (0, 4096, 8192, 12288, 16384, 32768, 40960):
        ballast = _leave_free(small_disk, nbytes)
        with pytest.raises(CapacityError, match=r"the file system is full, \d+ bytes free"):
            open_store(small_disk / "store")
        ballast.unlink()
    with open_store(small_disk / "store") as store:
        assert store.put([block_key(1)], [make_slot(1)], [40]) == [Outcome.STORED]


def test_a_full_file_system_lets_a_writer_in_to_make_room(small_disk: Path) -> None:
    with open_store(small_disk) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(4), {})
    (small_disk / "writer.lock").write_bytes(b"")
    ballast = _leave_free(small_disk, 32768)
    with open_store(small_disk) as store:
        assert store.remove_stream("lecture") == 4 * EXTENT_NBYTES
    ballast.unlink()


def test_a_commit_that_a_full_file_system_cuts_short_is_a_capacity_error(small_disk: Path) -> None:
    catalogue = Catalogue(small_disk, writable=True, durable=False)
    catalogue.write(lambda view: view.put(Table.META, b"kept", b"1"))
    with pytest.raises(CapacityError, match=r"the file system is full, \d+ bytes free"):
        catalogue.write(lambda view: view.put(Table.META, b"big", bytes(5 << 20)))
    with catalogue.read() as view:
        assert [view.get(Table.META, key) for key in (b"kept", b"big")] == [b"1", None]
    catalogue.close()


@pytest.mark.parametrize(
    ("free_nbytes", "expected"), [(0, CapacityError), (64 << 20, StoreIOError), (None, StoreIOError)]
)
def test_an_io_error_of_a_writer_is_lack_of_room_only_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_nbytes: int | None, expected: type[KVStoreError]
) -> None:
    failure = importlib.import_module("lmdb").Error("mdb_txn_commit: Input/output error")
    failure.code = errno.EIO

    def fail(view: WriteView) -> None:
        raise failure

    monkeypatch.setattr("kvstore.tiers.catalogue.free_nbytes", lambda folder: free_nbytes)
    catalogue = Catalogue(tmp_path, writable=True, durable=False)
    with pytest.raises(expected):
        catalogue.write(fail)
    catalogue.close()


def test_a_read_only_file_system_can_be_read(small_disk: Path) -> None:
    with open_store(small_disk) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(2), {"next": 2})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ReadOnlyError, match="Read-only file system; open the store for reading"):
        open_store(small_disk)
    with open_store(small_disk, Access.READ) as store:
        assert store.fetch(requests_for(make_blocks(2))).outcomes == [Outcome.DISK] * 2
        assert store.verify().is_clean


def test_a_read_only_file_system_gets_no_new_store(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ReadOnlyError, match="Read-only file system; no store can be made here"):
        open_store(small_disk / "store")


@pytest.mark.parametrize(
    ("free_nbytes", "said"),
    [(0, "the file system is full, 0 bytes"), (1 << 40, "a quota"), (None, "the file system is full;")],
)
def test_a_quota_is_told_from_a_full_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_nbytes: int | None, said: str
) -> None:
    monkeypatch.setattr("kvstore.tiers.room.free_nbytes", lambda folder: free_nbytes)
    assert said in describe_full(tmp_path)


def test_a_file_that_is_long_enough_keeps_the_locks_that_this_process_holds_on_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    reserve(path, 5000)
    assert path.stat().st_size == 5000
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        reserve(path, 5000)
        ask = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", ask, str(path)], capture_output=True, text=True, check=False)
        assert "BlockingIOError" in other.stderr


REFUSALS = [
    (errno.EROFS, ReadOnlyError),
    (errno.EACCES, ReadOnlyError),
    (errno.EPERM, ReadOnlyError),
    (errno.ENOSPC, CapacityError),
    (errno.EDQUOT, CapacityError),
    (errno.EIO, StoreIOError),
]


@pytest.mark.parametrize(("number", "expected"), REFUSALS)
def test_what_the_system_says_to_a_new_store_has_a_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[KVStoreError]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(expected, match=str(tmp_path / "store")):
        open_store(tmp_path / "store")


@pytest.mark.parametrize(("number", "expected"), REFUSALS)
def test_what_the_system_says_to_the_writer_of_an_old_store_has_a_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[KVStoreError]
) -> None:
    open_store(tmp_path).close()

    def refuse(path: Path, *_: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(expected, match=str(tmp_path)) as caught:
        WriterLock(tmp_path / "writer.lock")
    assert ("open the store for reading" in str(caught.value)) is (expected is ReadOnlyError)
