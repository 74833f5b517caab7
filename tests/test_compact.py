# SPDX-License-Identifier: Apache-2.0
"""Compaction: files become short, every block keeps its bytes, and whoever reads or writes meanwhile goes on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, ReadOnlyError
from kvstore.store import Access, Outcome, Store
from kvstore.tiers.upkeep.compact import Compactor
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

EXTENT_FILE = Path("extents") / "00000000.extents"


def _fill(store: Store, numbers: range, num_tokens: list[int]) -> None:
    keys = [block_key(number) for number in numbers]
    outcomes = store.put(keys, [make_slot(number) for number in numbers], num_tokens)
    assert set(outcomes) == {Outcome.STORED}


def _check(store: Store, numbers: list[int], num_tokens: dict[int, int]) -> None:
    """Every block reads back from disk, bit for bit, and every byte is accounted for."""
    for number in numbers:
        slot = empty_slot()
        assert store.get([block_key(number)], [slot])[0].is_hit
        assert same_block(slot, make_slot(number), num_tokens[number]), f"block {number} holds other bytes"
    report = store.verify()
    assert report.is_clean, report.structure
    assert report.account is not None
    assert report.account.unaccounted_nbytes == 0


def test_blocks_of_one_size_leave_no_hole_and_the_file_is_cut(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _fill(store, range(100), [40] * 100)
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(5), {"next": 5})
        store.flush()
        store.remove([block_key(number) for number in range(100) if number % 3])
        kept = sorted({*range(0, 100, 3), *range(5)})
        before = {number: store._disk.look_up([block_key(number)], [False])[0] for number in kept}

        report = Compactor(store._disk, store._pool).run()

        assert report.after_nbytes == len(kept) * EXTENT_NBYTES == (tmp_path / EXTENT_FILE).stat().st_size
        assert report.before_nbytes > report.after_nbytes
        assert report.moved_nbytes == report.moved_blocks * EXTENT_NBYTES
        after = {number: store._disk.look_up([block_key(number)], [False])[0] for number in kept}
        assert sum(before[number] != after[number] for number in kept) == report.moved_blocks > 10
        _check(store, kept, dict.fromkeys(kept, 40))
        assert Compactor(store._disk, store._pool).run().moved_blocks == 0
    with open_store(tmp_path, Access.READ) as store:
        assert store.fetch(requests_for(make_blocks(5))).outcomes == [Outcome.DISK] * 5
        assert store.verify().is_clean


def test_blocks_of_many_sizes_leave_holes_smaller_than_all_behind_them(tmp_path: Path) -> None:
    rng = random.Random(7)
    num_tokens = {number: rng.randint(1, 40) for number in range(200)}
    with open_store(tmp_path) as store:
        _fill(store, range(200), list(num_tokens.values()))
        kept = sorted(rng.sample(range(200), 70))
        store.remove([block_key(number) for number in range(200) if number not in kept])
        report = Compactor(store._disk, store._pool, step_nbytes=100_000).run()
        extents = [store._disk.look_up([block_key(number)], [False])[0] for number in kept]
        placed = [found.record.extent for found in extents if found is not None and not isinstance(found, Exception)]
        for offset, nbytes in store._disk.allocator.free_ranges()[0]:
            assert all(extent.nbytes > nbytes for extent in placed if extent.offset > offset)
        assert report.after_nbytes < 2 * sum(extent.nbytes for extent in placed)
        _check(store, kept, num_tokens)


def test_a_step_moves_no_more_than_it_may_and_lets_others_write_between(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _fill(store, range(40), [40] * 40)
        store.remove([block_key(number) for number in range(20)])
        compactor = Compactor(store._disk, store._pool, step_nbytes=3 * EXTENT_NBYTES)
        num_steps = 0
        while compactor.step():
            num_steps += 1
            assert store.put([block_key(100 + num_steps)], [make_slot(100 + num_steps)], [40]) == [Outcome.STORED]
            assert store.verify().is_clean
        assert num_steps > 4
        kept = [*range(20, 40), *range(101, 101 + num_steps)]
        _check(store, kept, dict.fromkeys(kept, 40))


def test_a_reader_that_looked_a_block_up_before_it_moved_reads_the_right_bytes(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _fill(store, range(10), [40] * 10)
        stale = store._disk.look_up([block_key(9)], [True])
        true_look_up = store._disk.look_up
        store.remove([block_key(number) for number in range(9)])
        assert Compactor(store._disk, store._pool).run().moved_blocks == 1
        _fill(store, range(20, 40), [40] * 20)  # someone else lies where it lay

        def late(keys: object, with_directory: object) -> object:
            store._disk.look_up = true_look_up  # type: ignore[method-assign]
            return stale

        store._disk.look_up = late  # type: ignore[method-assign, assignment]
        slot = empty_slot()
        store._data.host.forget(block_key(9))  # type: ignore[union-attr]
        assert store.get([block_key(9)], [slot]) == [Outcome.DISK]
        assert same_block(slot, make_slot(9))


def test_a_damaged_block_stays_where_it_is_and_the_others_move(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _fill(store, range(10), [40] * 10)
        store.remove([block_key(number) for number in range(5)])
        with (tmp_path / EXTENT_FILE).open("r+b") as file:
            file.seek(7 * EXTENT_NBYTES + 2000)
            file.write(bytes(200))
        assert Compactor(store._disk, store._pool).run().moved_blocks == 4
        (fault,) = store.verify().faults
        assert fault.key == block_key(7)
        assert not store.verify().structure


def test_an_empty_store_and_a_reader_have_nothing_to_compact(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert Compactor(store._disk, store._pool).run().moved_blocks == 0
        with pytest.raises(ConfigError):
            Compactor(store._disk, store._pool, step_nbytes=0)
    with open_store(tmp_path, Access.READ) as store, pytest.raises(ReadOnlyError):
        Compactor(store._disk, store._pool)
