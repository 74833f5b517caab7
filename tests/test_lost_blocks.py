# SPDX-License-Identifier: Apache-2.0
"""Blocks that a store lost and that come back: who named them before counts, whoever brings them and whoever goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.store import Outcome, Store
from kvstore.tiers.catalogue import Catalogue, Table, WriteView
from kvstore.tiers.upkeep.export_stream import export_stream
from kvstore.tiers.upkeep.import_stream import import_stream
from kvstore.tiers.upkeep.repair import Repairer
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

LOST = 2
SECOND = replace(HEADER, name="second")


def _damage(folder: Path) -> None:
    with (folder / "extents" / "00000000.extents").open("r+b") as file:
        file.seek(LOST * EXTENT_NBYTES + 1000)
        file.write(bytes(100))


def _append(store: Store, name: str) -> None:
    store.create_stream(replace(HEADER, name=name))
    store.append(name, make_blocks(4), {"next": 4})
    store.flush()


def _by_repair(folder: Path) -> None:
    """A store whose stream "lecture" has lost a block by damage."""
    with open_store(folder) as store:
        _append(store, "lecture")
    _damage(folder)
    with open_store(folder) as store:
        assert Repairer(store._disk, store._pool).run().lost == [("lecture", LOST)]


def _by_import(folder: Path) -> None:
    """A store whose stream "lecture" came from one that had lost a block."""
    with open_store(folder / "origin") as store:
        _append(store, "lecture")
    _damage(folder / "origin")
    with open_store(folder / "origin") as store:
        export_stream(store._disk, store._pool, "lecture", folder / "file")
    with open_store(folder) as store:
        assert import_stream(store._disk, store._pool, folder / "file").missing == [block_key(LOST)]


def _bring_by_append(store: Store) -> None:
    _append(store, "second")


def _bring_by_put(store: Store) -> None:
    store.put([block_key(LOST)], [make_slot(LOST)], [40])
    _append(store, "second")


def _all_there(store: Store, name: str) -> None:
    assert store.verify().is_clean
    assert not store.verify(name).faults
    blocks = make_blocks(4)
    requests = requests_for(blocks)
    assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
    assert all(same_block(request.slot, block.slot) for request, block in zip(requests, blocks, strict=True))


@pytest.mark.parametrize("lose", [_by_repair, _by_import])
@pytest.mark.parametrize("bring", [_bring_by_append, _bring_by_put])
@pytest.mark.parametrize(
    "leave", [lambda store: store.rollback("lecture", 0), lambda store: store.remove_stream("lecture")]
)
def test_a_stream_that_waited_for_a_block_may_go_and_others_keep_it(
    tmp_path: Path, lose: Callable[[Path], None], bring: Callable[[Store], None], leave: Callable[[Store], object]
) -> None:
    lose(tmp_path)
    with open_store(tmp_path) as store:
        assert not store.verify().structure
        bring(store)
        _all_there(store, "second")
        _all_there(store, "lecture")
        leave(store)
        _all_there(store, "second")
        store.remove_stream("second")
        assert not any(store.exists([block_key(number) for number in range(4)]))
        assert store.verify().is_clean


@pytest.mark.parametrize("lose", [_by_repair, _by_import])
def test_a_lost_block_that_comes_back_is_needed_and_one_that_nobody_waits_for_is_plain(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    lose(tmp_path)
    with open_store(tmp_path) as store:
        store.put([block_key(LOST)], [make_slot(LOST)], [40])
        assert store.remove([block_key(LOST)]) == [False]
        _all_there(store, "lecture")
    lose(tmp_path / "again")
    with open_store(tmp_path / "again") as store:
        store.remove_stream("lecture")
        store.put([block_key(LOST)], [make_slot(LOST)], [40])
        assert store.remove([block_key(LOST)]) == [True]
        assert store.verify().is_clean


def test_a_damaged_count_of_who_waits_is_counted_anew(tmp_path: Path) -> None:
    _by_repair(tmp_path)
    _change(tmp_path, lambda view: view.put(Table.META, b"awaited " + block_key(LOST), b"x"))
    with open_store(tmp_path) as store:
        assert store.verify().structure
        _append(store, "second")
        store.remove_stream("lecture")
        _all_there(store, "second")


def _change(folder: Path, work: Callable[[WriteView], object]) -> None:
    catalogue = Catalogue(folder / "catalogue", writable=True, durable=False)
    catalogue.write(work)
    catalogue.close()


@pytest.mark.parametrize("value", [b"x", b"\x03" + bytes(47)])
def test_a_damaged_row_of_one_block_costs_no_other_and_is_replaced_when_the_block_comes_along(
    tmp_path: Path, value: bytes
) -> None:
    with open_store(tmp_path) as store:
        store.put([block_key(5), block_key(6)], [make_slot(5), make_slot(6)], [40, 40])
        _append(store, "lecture")
    for number in (1, 5):
        _change(tmp_path, lambda view, number=number: view.put(Table.BLOCKS, block_key(number), value))  # type: ignore[misc]
    with open_store(tmp_path) as store:
        assert store.get([block_key(5), block_key(6)], [empty_slot(), empty_slot()])[1].is_hit
        assert store.remove([block_key(5), block_key(6)]) == [False, True], "used before, as far as there is an entry"
        assert (
            store.put([block_key(n) for n in (5, 7)], [make_slot(n) for n in (5, 7)], [40] * 2) == [Outcome.STORED] * 2
        )
        _append(store, "second")
        _all_there(store, "second")
        assert store.remove([block_key(5)]) == [True]
        store.remove_stream("lecture")
        _all_there(store, "second")
        report = store.verify()
        assert report.account is not None
        assert (report.account.unaccounted_nbytes, report.account.orphan_nbytes) == (0, 0)
