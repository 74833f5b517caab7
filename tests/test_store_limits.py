# SPDX-License-Identifier: Apache-2.0
"""A catalogue at its limit, a file system that turns read-only, values that no writer made: the rest goes on."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kvstore.errors import CapacityError, KVStoreError, ReadOnlyError, StoreIOError
from kvstore.store import Access, Outcome, Store
from kvstore.tiers.catalogue import Catalogue, Table
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    requests_for,
    same_block,
)

SUMMARY = bytes(40_000)
"""Fills the catalogue, and not the extent files."""


def _append_until_full(store: Store, most: int) -> int:
    """Append blocks with large summaries until the catalogue is full; returns how many are durable."""
    for index in range(most):
        (block,) = make_blocks(1, index)
        store.append("lecture", [replace(block, summary=SUMMARY)], {"next": index + 1})
        try:
            store.flush()
        except CapacityError:
            break
    else:
        pytest.fail(f"{most} entries fit")
    return len(store.manifest("lecture").entries)


def test_a_catalogue_at_its_limit_refuses_what_is_new_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.tiers.disk.Catalogue", partial(Catalogue, max_map_nbytes=1 << 20))
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        count = _append_until_full(store, 40)
        assert count > 4
        assert store.manifest("lecture").cursor == {"next": count}
        _check_blocks(store, count)
        assert store.verify().is_clean
        assert store.remove_stream("lecture") == count * EXTENT_NBYTES
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(4), {"next": 4})
        store.flush()
        assert store.verify().is_clean
    with open_store(tmp_path, Access.READ) as store:
        assert store.fetch(requests_for(make_blocks(4))).outcomes == [Outcome.DISK] * 4


@pytest.fixture
def fragile_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 32 MiB that turns read-only at its first error."""
    image, where = tmp_path / "image", tmp_path / "disk"
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    made, mounted = ["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop,errors=remount-ro", str(image)]
    try:
        if any(
            subprocess.run(each, capture_output=True, check=False).returncode for each in (made, [*mounted, str(where)])
        ):
            pytest.skip("mounting a file system needs privileges")
    except FileNotFoundError as error:
        pytest.skip(f"making a file system needs {error.filename}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def _break_file_system(where: Path) -> None:
    """Let ext4 believe that it found an error."""
    (device,) = [line.split()[0] for line in Path("/proc/mounts").read_text("utf-8").splitlines() if str(where) in line]
    trigger = Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
    if not trigger.exists():
        pytest.skip("this kernel cannot be asked for an error")
    trigger.write_text("a test", encoding="ascii")
    with pytest.raises(OSError, match="Read-only"):
        (where / "probe").touch()


def test_a_file_system_that_turns_read_only_under_a_writer_leaves_a_store_that_answers(fragile_disk: Path) -> None:
    with open_store(fragile_disk / "store") as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(4), {"next": 4})
        store.flush()
        _break_file_system(fragile_disk)
        store.append("lecture", make_blocks(2, 4), {"next": 6})
        with pytest.raises((ReadOnlyError, StoreIOError)):
            store.flush()
        assert store.manifest("lecture").cursor == {"next": 4}
        with pytest.raises((ReadOnlyError, StoreIOError)):
            store.remove_stream("lecture")
        _check_blocks(store, 4)
    with pytest.raises(ReadOnlyError):
        open_store(fragile_disk / "store")
    with open_store(fragile_disk / "store", Access.READ) as store:
        assert store.manifest("lecture").cursor == {"next": 4}
        _check_blocks(store, 4)
        assert store.verify().is_clean


def _check_blocks(store: Store, count: int) -> None:
    requests = requests_for(make_blocks(count))
    assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
    assert all(same_block(request.slot, make_slot(number)) for number, request in enumerate(requests))


DAMAGE = [b"", b"\x01\x02", b"\xff" * 48, bytes(48), struct.pack("<BxxxIIIQQQQ", 1, 40, 0, 0, 7, 9, 1, 1)]


@pytest.mark.parametrize("value", DAMAGE)
@pytest.mark.parametrize("table", list(Table))
def test_damaged_values_of_any_table_cost_no_more_than_what_they_describe(
    tmp_path: Path, table: Table, value: bytes
) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(3), {"next": 3})
        store.flush()
        store.put([block_key(50)], [make_slot(50)], [40])
    catalogue = Catalogue(tmp_path / "catalogue", writable=True, durable=False)
    with catalogue.read() as view:
        keys = [key for key, _ in view.scan(table)]
    catalogue.write(lambda view: view.put(table, keys[0], value) if keys and value else None)
    catalogue.close()
    for access in (Access.READ, Access.WRITE):
        try:
            store = open_store(tmp_path, access)
        except KVStoreError:
            assert table is Table.META  # without its version and its counters, nothing can be trusted
            continue
        with store:
            numbers = (0, 1, 2, 50)
            slots = [empty_slot() for _ in numbers]
            outcomes = store.get([block_key(number) for number in numbers], slots)
            for number, slot, outcome in zip(numbers, slots, outcomes, strict=True):
                assert not outcome.is_hit or same_block(slot, make_slot(number))
            assert sum(outcome.is_hit for outcome in outcomes) >= 3
            store.verify()
            if access is Access.WRITE:
                assert store.put([block_key(60)], [make_slot(60)], [40]) == [Outcome.STORED]
                slot = empty_slot()
                assert store.get([block_key(60)], [slot])[0].is_hit
                assert same_block(slot, make_slot(60))
