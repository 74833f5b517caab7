# SPDX-License-Identifier: Apache-2.0
"""Repair: what is damaged goes, what is sound stays bit for bit, the tables agree again, and the report says it all."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.errors import ReadOnlyError
from kvstore.store import Access, Durability, FetchRequest, Outcome, Store
from kvstore.tiers.catalogue import Catalogue, Table, WriteView
from kvstore.tiers.tables.records import position_key
from kvstore.tiers.upkeep.repair import Repairer, RepairReport
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    renumbered,
    same_block,
)

EXTENT_FILE = Path("extents") / "00000000.extents"
SIDE = replace(HEADER, name="side")


def _fill(path: Path) -> None:
    """Two streams that share blocks 0 to 2, and two plain blocks."""
    with open_store(path, durability=Durability.NONE) as store:
        for header, blocks in ((HEADER, make_blocks(6)), (SIDE, make_blocks(3))):
            store.create_stream(header)
            store.append(header.name, [renumbered(block, index) for index, block in enumerate(blocks)], {"next": 9})
        store.flush()
        store.put([block_key(50), block_key(51)], [make_slot(50), make_slot(51)], [40, 40])


def _change(path: Path, work: Callable[[WriteView], object]) -> None:
    catalogue = Catalogue(path / "catalogue", writable=True, durable=False)
    catalogue.write(work)
    catalogue.close()


def _repair(path: Path) -> RepairReport:
    """Repair; afterwards the tables agree, and a second repair finds nothing to do."""
    with open_store(path, durability=Durability.NONE) as store:
        report = Repairer(store._disk, store._pool).run()
        verified = store.verify()
        assert not verified.structure
        assert verified.account is not None
        assert (verified.account.unaccounted_nbytes, verified.account.orphan_nbytes) == (0, 0)
        assert {fault.reason for fault in verified.faults} <= {"the block is not stored"}
        assert {(fault.stream, fault.index) for fault in verified.faults} == set(report.lost)
        assert not Repairer(store._disk, store._pool).run().has_changed
    return report


def _outcomes(store: Store, name: str) -> list[bool]:
    """Which entries of a stream are hits; those hold the right bytes."""
    entries = store.manifest(name).entries
    requests = [FetchRequest(entry.key, empty_slot()) for entry in entries]
    hits = [outcome.is_hit for outcome in store.fetch(requests).outcomes]
    assert all(same_block(r.slot, make_slot(n)) for n, (r, hit) in enumerate(zip(requests, hits, strict=True)) if hit)
    return hits


def _hits(path: Path, name: str = "lecture") -> list[bool]:
    with open_store(path, Access.READ) as store:
        return _outcomes(store, name)


def test_a_sound_store_is_left_alone(tmp_path: Path) -> None:
    _fill(tmp_path)
    before = (tmp_path / EXTENT_FILE).read_bytes()
    report = _repair(tmp_path)
    assert (report.num_blocks, report.has_changed, report.lost) == (8, False, [])
    assert (tmp_path / EXTENT_FILE).read_bytes() == before


def test_a_damaged_block_goes_and_its_entries_are_misses_until_it_is_stored_again(tmp_path: Path) -> None:
    _fill(tmp_path)
    with (tmp_path / EXTENT_FILE).open("r+b") as file:
        file.seek(EXTENT_NBYTES + 1000)
        file.write(bytes(100))
    report = _repair(tmp_path)
    assert list(report.dropped) == [block_key(1)]
    assert report.lost == [("lecture", 1), ("side", 1)]
    assert _hits(tmp_path) == [True, False, True, True, True, True]
    with open_store(tmp_path) as store:
        assert store.get([block_key(1)], [empty_slot()]) == [Outcome.MISS]
        store.put([block_key(1)], [make_slot(1)], [40])
        assert store.verify().is_clean, "its references are counted again"
        assert store.remove([block_key(1)]) == [False]
        assert all(_outcomes(store, "side"))


def test_blocks_behind_the_end_of_a_cut_file_go_and_those_of_a_missing_file_stay(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / EXTENT_FILE).rename(tmp_path / "elsewhere")
    with open_store(tmp_path) as store:
        report = Repairer(store._disk, store._pool).run()
        assert not report.dropped
        assert len(report.unreadable) == 8
        store.put([block_key(60)], [make_slot(60)], [40])
        assert store.get([block_key(60)], [empty_slot()])[0].is_hit, "new blocks go to a new file"
    (tmp_path / "elsewhere").rename(tmp_path / EXTENT_FILE)
    assert _hits(tmp_path) == [True] * 6
    os.truncate(tmp_path / EXTENT_FILE, 4 * EXTENT_NBYTES + 4096)
    report = _repair(tmp_path)
    assert len(report.dropped) == 4
    assert _hits(tmp_path) == [True] * 4 + [False] * 2


def _delete(table: Table, key: bytes) -> Callable[[WriteView], object]:
    return lambda view: view.delete(table, key)


def _put(table: Table, key: bytes, value: bytes) -> Callable[[WriteView], object]:
    return lambda view: view.put(table, key, value)


CHANGES: list[tuple[Callable[[WriteView], object], list[bool]]] = [
    (_delete(Table.BLOCKS, block_key(4)), [True, True, True, True, False, True]),
    (_put(Table.BLOCKS, block_key(4), b"x"), [True, True, True, True, False, True]),
    (_put(Table.BLOCKS, b"short", b"x"), [True] * 6),
    (_delete(Table.DIRECTORIES, block_key(4)), [True] * 6),
    (_put(Table.DIRECTORIES, block_key(4), b"wrong"), [True] * 6),
    (_put(Table.DIRECTORIES, block_key(99), b"of nobody"), [True] * 6),
    (_delete(Table.EXTENTS, struct.pack(">IQ", 0, 0)), [True] * 6),
    (_put(Table.EXTENTS, struct.pack(">IQ", 0, 1 << 30), struct.pack("<Q", 4096) + block_key(1)), [True] * 6),
    (_put(Table.EXTENTS, b"short", b"x"), [True] * 6),
    (_put(Table.LRU, bytes(8), block_key(0)), [True] * 6),
    (_put(Table.LRU, bytes(8), b"x"), [True] * 6),
    (_delete(Table.ENTRIES, position_key(1, 3)), [True, True, True, False, True, True]),
    (_put(Table.ENTRIES, position_key(1, 5), b"x"), [True, True, True, True, True, False]),
    (_delete(Table.ENTRIES, position_key(1, 0)), [False, True, True, True, True, True]),
    (_put(Table.ENTRIES, position_key(77, 0), b"of nobody"), [True] * 6),
    (_put(Table.SUMMARIES, position_key(77, 0), b"of nobody"), [True] * 6),
    (_put(Table.STATES, bytes(8), b"of nobody"), [True] * 6),
    (_put(Table.STATES, struct.pack(">Q", 1), b"x"), [True] * 6),
    (_delete(Table.STATES, struct.pack(">Q", 1)), [True] * 6),
    (_put(Table.STREAMS, b"side", b"x"), [True] * 6),
    (_put(Table.STREAMS, b"\xff", b"x"), [True] * 6),
    (_put(Table.META, b"next stream id", b"x"), [True] * 6),
    (_put(Table.CALIBRATIONS, b"o" + bytes(16), b"x"), [True] * 6),
]


@pytest.mark.parametrize(("change", "hits"), CHANGES)
def test_each_damaged_row_costs_what_it_described_and_no_more(
    tmp_path: Path, change: Callable[[WriteView], object], hits: list[bool]
) -> None:
    _fill(tmp_path)
    _change(tmp_path, change)
    report = _repair(tmp_path)
    assert report.has_changed or report.lost
    assert _hits(tmp_path) == hits
    with open_store(tmp_path) as store:
        assert store.manifest("lecture").num_tokens == 240
        assert [entry.first_token for entry in store.manifest("lecture").entries] == list(range(0, 240, 40))
        store.create_stream(replace(HEADER, name="next"))
        store.append("next", make_blocks(6), {})
        store.flush()
        assert all(_outcomes(store, "next"))


def test_a_stream_that_lost_its_cursor_counts_as_complete(tmp_path: Path) -> None:
    _fill(tmp_path)
    _change(tmp_path, _put(Table.STATES, struct.pack(">Q", 1), b"x"))
    _repair(tmp_path)
    with open_store(tmp_path, Access.READ) as store:
        assert store.manifest("lecture").is_complete


def _rows(path: Path) -> list[tuple[Table, bytes, bytes]]:
    """Every row but the counters, which move with every writer."""
    catalogue = Catalogue(path / "catalogue", writable=False, durable=False)
    rows: list[tuple[Table, bytes, bytes]] = []
    with catalogue.read() as view:
        rows += [(table, key, value) for table in Table if table is not Table.META for key, value in view.scan(table)]
    catalogue.close()
    return rows


def test_any_mixture_of_damage_is_repaired(tmp_path: Path) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        path = tmp_path / str(seed)
        _fill(path)
        rows = _rows(path)

        def damage(view: WriteView, rng: random.Random = rng, rows: list[tuple[Table, bytes, bytes]] = rows) -> None:
            for table, key, value in rng.sample(rows, 8):
                match rng.randrange(3):
                    case 0:
                        view.delete(table, key)
                    case 1:
                        view.put(table, key, rng.randbytes(rng.choice((1, len(value), len(value) + 1))))
                    case _:
                        view.put(table, rng.randbytes(len(key)), value)

        _change(path, damage)
        _repair(path)


def test_a_reader_cannot_repair(tmp_path: Path) -> None:
    _fill(tmp_path)
    with open_store(tmp_path, Access.READ) as store, pytest.raises(ReadOnlyError):
        Repairer(store._disk, store._pool)
