# SPDX-License-Identifier: Apache-2.0
"""A large catalogue that was looked at does not stay in memory; a manifest that is read in parts is one snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.store import Access, Manifest
from kvstore.tiers.catalogue import Catalogue, ReadView, Table
from kvstore.tiers.placing import taken
from kvstore.tiers.placing.taken import TakenBytes
from kvstore.tiers.tables import take_manifest as taking
from kvstore.tiers.tables.streams import read_manifest
from tests.store_blocks import EXTENT_NBYTES, HEADER, make_blocks, open_store

VALUE = bytes(range(250)) * 8
NUM_VALUES = 12_000


def resident_nbytes(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    found, is_this = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            is_this = rest[-1] == str(path)
        elif is_this and name == "Rss:":
            found += int(rest[0]) << 10
    return found


@pytest.fixture
def large(tmp_path: Path) -> Path:
    catalogue = Catalogue(tmp_path, writable=True, durable=False)
    catalogue.write(lambda view: view.put_many(Table.META, ((b"%8d" % number, VALUE) for number in range(NUM_VALUES))))
    catalogue.close()
    return tmp_path


def look(catalogue: Catalogue, first: int, last: int) -> None:
    """Look at values one by one."""
    for number in range(first, last):
        with catalogue.read() as view:
            assert view.get(Table.META, b"%8d" % number) == VALUE


@pytest.mark.parametrize("writable", [True, False])
def test_what_was_looked_at_does_not_stay_in_memory(writable: bool, large: Path) -> None:
    catalogue = Catalogue(large, writable=writable, durable=False)
    look(catalogue, 0, NUM_VALUES)
    assert resident_nbytes(large / "data.mdb") < 10 << 20
    catalogue.close()
    catalogue.pages.let_go()


def test_a_map_in_use_stays_and_is_let_go_afterwards(large: Path) -> None:
    catalogue = Catalogue(large, writable=False, durable=False)
    with catalogue.read() as view:
        rows = view.scan(Table.META)
        assert next(rows) == (b"%8d" % 0, VALUE)
        look(catalogue, 1, NUM_VALUES - 3)
        assert resident_nbytes(large / "data.mdb") > 20 << 20
        assert next(rows) == (b"%8d" % 1, VALUE)
    look(catalogue, 0, 1)  # it was due, and is made up for at once
    assert resident_nbytes(large / "data.mdb") < 1 << 20
    look(catalogue, 0, 1)
    catalogue.close()


def test_a_manifest_read_in_parts_is_that_of_the_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "_MOST_ENTRIES", 2)
    seen = []
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(5), {"next": 5})
        store.flush()

        def reading(view: ReadView, name: str, known: Manifest | None, most: int) -> Manifest:
            found = read_manifest(view, name, known, most)
            seen.append(len(found.entries))
            return found

        monkeypatch.setattr(taking, "read_manifest", reading)
        assert store.manifest("lecture").entries == [block.entry for block in make_blocks(5)]
        assert seen == [2, 4, 5]
        steps = [1, 2]

        def reading_while_it_changes(view: ReadView, name: str, known: Manifest | None, most: int) -> Manifest:
            found = reading(view, name, known, most)
            waiting.extend(steps[:1])
            del steps[:1]
            return found

        waiting: list[int] = []
        monkeypatch.setattr(taking, "read_manifest", reading_while_it_changes)
        let_go = store._disk.catalogue.pages.let_go

        def between() -> None:
            step = waiting.pop() if waiting else 0
            if step == 1:
                store.append("lecture", make_blocks(2, 5), {"next": 7})
                store.flush()
            if step == 2:
                store.rollback("lecture", 80)
            let_go()

        monkeypatch.setattr(store._disk.catalogue.pages, "let_go", between)
        del seen[:]
        found = store.manifest("lecture")
        assert seen == [2, 4, 2]
        assert [entry.index for entry in found.entries] == [0, 1]
        assert (found.num_tokens, found.cursor) == (80, {})


def test_a_reader_counts_the_bytes_of_many_extents_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taken, "_PART_ROWS", 2)
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(5), {})
        store.flush()
        used = store.stats().usage.extent_used_nbytes
        assert used == 5 * EXTENT_NBYTES
        counting = TakenBytes(store._disk.catalogue)
        assert counting.nbytes() == used
        store.append("lecture", make_blocks(3, 5), {})
        store.flush()
        monkeypatch.setattr(taken, "_SHORT_S", -1.0)
        assert counting.nbytes() == 8 * EXTENT_NBYTES
        monkeypatch.setattr(taken, "_SHARE", 1e-9)
        counting = TakenBytes(store._disk.catalogue)
        assert counting.nbytes() == 8 * EXTENT_NBYTES
        store.rollback("lecture", 0)
        assert counting.nbytes() == 8 * EXTENT_NBYTES
    with open_store(tmp_path, Access.READ) as reader:
        assert reader.stats().usage.extent_used_nbytes == 0
