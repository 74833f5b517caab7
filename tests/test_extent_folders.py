# SPDX-License-Identifier: Apache-2.0
"""Extents on several drives: new ones are spread, a drive that is away costs its blocks and no others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import kvstore
from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.store import Access, Outcome, Store
from kvstore.tiers.catalogue import Catalogue, Table
from kvstore.tiers.placing import allocator
from kvstore.tiers.upkeep.compact import Compactor
from kvstore.tiers.upkeep.repair import Repairer
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    LAYOUT,
    SPEC,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    same_block,
)

NUM_BLOCKS = 40


@pytest.fixture(autouse=True)
def small_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "STRIPE_NBYTES", 4 * EXTENT_NBYTES)


def _open(path: Path, folders: Sequence[Path] = (), disk_nbytes: int | None = None) -> Store:
    return Store.open(
        path / "store",
        access=Access.WRITE,
        layout=LAYOUT,
        host_nbytes=2 * LAYOUT.slot_nbytes,
        disk_nbytes=disk_nbytes,
        extent_folders=folders,
    )


def _fill(path: Path) -> list[Path]:
    """A stream on three drives."""
    folders = [path / "second", path / "third"]
    with _open(path, folders) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(NUM_BLOCKS), {"next": NUM_BLOCKS})
    return folders


def _read(store: Store) -> list[Outcome]:
    slots = [empty_slot() for _ in range(NUM_BLOCKS)]
    outcomes = store.get([block_key(number) for number in range(NUM_BLOCKS)], slots)
    for number, (slot, outcome) in enumerate(zip(slots, outcomes, strict=True)):
        assert not outcome.is_hit or same_block(slot, make_slot(number)), f"block {number} holds other bytes"
    return outcomes


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.extents")}


def test_new_extents_are_spread_over_the_folders_which_are_remembered(tmp_path: Path) -> None:
    folders = _fill(tmp_path)
    places = [tmp_path / "store" / "extents", *folders]
    assert [_files(place) for place in places] == [{f"0000000{number}.extents"} for number in range(3)]
    used = [next(place.glob("*.extents")).stat().st_size for place in places]
    assert sum(used) == NUM_BLOCKS * EXTENT_NBYTES
    assert max(used) - min(used) <= 8 * EXTENT_NBYTES
    with open_store(tmp_path / "store", Access.READ) as store:
        assert all(outcome.is_hit for outcome in _read(store))
    with _open(tmp_path) as store:
        store.put([block_key(n) for n in range(100, 124)], [make_slot(n) for n in range(100, 124)], [40] * 24)
        report = store.verify()
        assert report.is_clean
        assert report.account is not None
        assert report.account.unaccounted_nbytes == 0
        assert all(
            next(place.glob("*.extents")).stat().st_size > before for place, before in zip(places, used, strict=True)
        )


def test_a_folder_that_is_away_costs_its_blocks_and_comes_back_whole(tmp_path: Path) -> None:
    folders = _fill(tmp_path)
    folders[0].rename(tmp_path / "unplugged")
    folders[0].mkdir()  # a mount point with nothing mounted
    with open_store(tmp_path / "store", Access.READ) as store:
        outcomes = _read(store)
    assert set(outcomes) == {Outcome.DISK, Outcome.MISS}
    num_missed = outcomes.count(Outcome.MISS)
    assert 8 <= num_missed <= 16
    with _open(tmp_path) as store:
        faults = store.verify().faults
        assert len(faults) == num_missed
        assert all("the folder is not there" in fault.reason for fault in faults)
        assert len(Repairer(store._disk, store._pool).run().unreadable) == num_missed
        store.append("lecture", make_blocks(8, NUM_BLOCKS), {"next": NUM_BLOCKS + 8})
        store.flush()
        Compactor(store._disk, store._pool).run()
        assert _read(store).count(Outcome.MISS) == num_missed
    assert not _files(folders[0])
    folders[0].rmdir()
    (tmp_path / "unplugged").rename(folders[0])
    with _open(tmp_path) as store:
        assert all(outcome.is_hit for outcome in _read(store))
        assert store.verify().is_clean


def test_blocks_that_are_away_are_not_evicted_for_room_that_they_do_not_make(tmp_path: Path) -> None:
    folders = [tmp_path / "second"]
    budget = (1 << 19) + 24 * EXTENT_NBYTES
    with _open(tmp_path, folders, budget) as store:
        store.put([block_key(n) for n in range(20)], [make_slot(n) for n in range(20)], [40] * 20)
    folders[0].rename(tmp_path / "unplugged")
    with _open(tmp_path, (), budget) as store:
        for number in range(100, 140):
            assert store.put([block_key(number)], [make_slot(number)], [40]) == [Outcome.STORED]
        assert store.verify().structure == []
    (tmp_path / "unplugged").rename(folders[0])
    with _open(tmp_path, (), budget) as store:
        numbers = [number for number in range(20) if store.get([block_key(number)], [empty_slot()])[0].is_hit]
        assert len(numbers) >= 8
        assert store.verify().is_clean


def test_a_folder_that_moved_is_found_by_its_mark(tmp_path: Path) -> None:
    folders = _fill(tmp_path)
    shutil.move(folders[1], tmp_path / "elsewhere")
    with _open(tmp_path, [tmp_path / "elsewhere"]) as store:
        assert all(outcome.is_hit for outcome in _read(store))
    with open_store(tmp_path / "store", Access.READ) as store:
        assert all(outcome.is_hit for outcome in _read(store))


def test_a_reader_finds_files_that_a_writer_adds_beside_it(tmp_path: Path) -> None:
    with _open(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(2), {"next": 2})
    folders = [tmp_path / "second"]
    with _open(tmp_path, folders):
        pass
    with open_store(tmp_path / "store", Access.READ) as store:
        map_before = store._disk.files.folders
    with _open(tmp_path) as store:
        store.append("lecture", make_blocks(NUM_BLOCKS - 2, 2), {"next": NUM_BLOCKS})
    with open_store(tmp_path / "store", Access.READ) as store:
        store._disk.files.folders = map_before  # as it was when this reader opened the store
        assert all(outcome.is_hit for outcome in _read(store))


def test_a_folder_of_another_store_is_refused(tmp_path: Path) -> None:
    folders = _fill(tmp_path)
    with pytest.raises(ConfigError, match="another store"):
        _open(tmp_path / "other", folders)


@pytest.mark.parametrize("value", [b"x", b"{}", b"[]", b'{"store_id":"","paths":["relative"],"of_file":[]}'])
def test_a_damaged_map_of_folders_is_a_typed_error(tmp_path: Path, value: bytes) -> None:
    _fill(tmp_path)
    catalogue = Catalogue(tmp_path / "store" / "catalogue", writable=True, durable=False)
    catalogue.write(lambda view: view.put(Table.META, b"extent folders", value))
    catalogue.close()
    for access in Access:
        with pytest.raises(CorruptRecordError, match="extent folders"):
            open_store(tmp_path / "store", access)


def test_the_face_takes_folders_too(tmp_path: Path) -> None:
    with kvstore.open(tmp_path / "store", SPEC, block_tokens=40, extent_folders=[tmp_path / "second"]) as store:
        for first in range(0, 32, 8):
            numbers = range(first, first + 8)
            store.put([block_key(number) for number in numbers], [make_slot(number) for number in numbers], [40] * 8)
    assert _files(tmp_path / "second") == {"00000001.extents"}
