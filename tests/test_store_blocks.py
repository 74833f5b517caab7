# SPDX-License-Identifier: Apache-2.0
"""Plain blocks: put, get, exists, remove, eviction under a budget, against a dict."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.errors import ShapeError
from kvstore.spec import BlockKey
from kvstore.store import Outcome, Store
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    renumbered,
    requests_for,
    same_block,
)

CATALOGUE_NBYTES = 1 << 19
"""More than the catalogue of a small store takes."""


def _put(store: Store, *numbers: int) -> list[Outcome]:
    return store.put([block_key(n) for n in numbers], [make_slot(n) for n in numbers], [40] * len(numbers))


def _exists(store: Store, *numbers: int) -> list[bool]:
    return store.exists([block_key(n) for n in numbers])


def test_put_blocks_come_back_and_putting_again_changes_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert _put(store, 1, 2, 1) == [Outcome.STORED] * 3
        assert _put(store, 2) == [Outcome.STORED]
        assert store.stats().num_blocks == 2
    with open_store(tmp_path) as store:
        slots = [empty_slot(), empty_slot()]
        assert store.get([block_key(2), block_key(3)], slots) == [Outcome.DISK, Outcome.MISS]
        assert same_block(slots[0], make_slot(2))


def test_removed_blocks_are_gone_everywhere(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _put(store, 1, 2)
        store.get([block_key(1)], [empty_slot()])
        assert store.remove([block_key(1), block_key(3)]) == [True, False]
        assert _exists(store, 1, 2) == [False, True]
        assert store.get([block_key(1)], [empty_slot()]) == [Outcome.MISS]
        assert store.verify().is_clean


def test_blocks_that_a_stream_needs_are_neither_removed_nor_evicted(tmp_path: Path) -> None:
    budget = CATALOGUE_NBYTES + 6 * EXTENT_NBYTES
    with open_store(tmp_path, disk_nbytes=budget) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(3), {})
        store.flush()
        assert store.remove([block_key(0)]) == [False]
        for number in range(100, 140):
            assert _put(store, number) == [Outcome.STORED]
        assert _exists(store, 0, 1, 2) == [True] * 3
        requests = requests_for(make_blocks(3))
        assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
        assert store.verify().is_clean


def test_the_least_recently_used_block_leaves_first(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=2) as store:
        _put(store, *range(4))
        # No free page is left after closing, and half a block more than what is there does not hold a fifth.
        budget = store.stats().usage.catalogue_nbytes + 4 * EXTENT_NBYTES + EXTENT_NBYTES // 2
    with open_store(tmp_path, host_slots=2, disk_nbytes=budget) as store:
        store.get([block_key(0)], [empty_slot()])
        assert _put(store, 50) == [Outcome.STORED]
    with open_store(tmp_path) as store:
        assert _exists(store, 0, 1, 2, 3, 50) == [True, False, True, True, True]
        assert store.verify().is_clean


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_the_budget_holds_and_old_blocks_make_room(tmp_path: Path, blocks: int) -> None:
    budget = CATALOGUE_NBYTES + blocks * EXTENT_NBYTES
    with open_store(tmp_path, disk_nbytes=budget) as store:
        for number in range(40):
            assert _put(store, number) == [Outcome.STORED]
            assert store.stats().usage.total_nbytes <= budget
        assert store.stats().disk.evicted_blocks > 0
        assert store.verify().is_clean


def test_a_block_that_cannot_fit_is_refused_and_the_others_stay(tmp_path: Path) -> None:
    with open_store(tmp_path, disk_nbytes=EXTENT_NBYTES) as store:
        assert _put(store, 1, 2) == [Outcome.FULL] * 2
        assert _exists(store, 1) == [False]
        assert store.verify().is_clean


def test_a_batch_larger_than_the_budget_is_stored_in_part(tmp_path: Path) -> None:
    with open_store(tmp_path, disk_nbytes=CATALOGUE_NBYTES) as store:
        outcomes = _put(store, *range(60))
        assert set(outcomes) == {Outcome.STORED, Outcome.FULL}
        stored = [outcome is Outcome.STORED for outcome in outcomes]
        assert _exists(store, *range(60)) == stored
        assert store.verify().is_clean


@pytest.mark.parametrize(("key", "tokens"), [(b"short", 40), (bytes(32), 0), (bytes(32), 41)])
def test_a_misuse_of_put_is_refused(tmp_path: Path, key: bytes, tokens: int) -> None:
    with open_store(tmp_path) as store, pytest.raises(ShapeError):
        store.put([BlockKey(key)], [make_slot(0)], [tokens])


@pytest.mark.parametrize("key", [b"", b"short", bytes(600)])
def test_keys_of_another_length_are_refused(tmp_path: Path, key: bytes) -> None:
    with open_store(tmp_path) as store:
        for call in (store.exists, store.remove, lambda keys: store.get(keys, [empty_slot()])):
            with pytest.raises(ShapeError, match="32 bytes"):
                call([BlockKey(key)])


def test_making_room_for_an_append_spares_the_old_blocks_that_it_names(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _put(store, 0, 1, 2)
    with open_store(tmp_path, disk_nbytes=1) as store:  # no growth: block 50 needs the room of another one
        store.create_stream(HEADER)
        store.append("lecture", [*make_blocks(1), renumbered(make_blocks(1, 50)[0], 1)], {})
        store.flush()
        assert _exists(store, 0, 1, 2, 50) == [True, False, True, True]
        assert store.verify().is_clean


class BlocksAgainstDict(RuleBasedStateMachine):
    """Twelve blocks of changing length in a store with room for about eight; a dict says what must come back."""

    numbers = st.integers(0, 11)

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.budget = 8 * EXTENT_NBYTES + 4 * 4096 * 30
        self.store = open_store(self.path, host_slots=2, disk_nbytes=self.budget)
        self.known: dict[int, int] = {}
        self.in_stream: set[int] = set()
        self.num_entries = 0

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.path)

    @rule(number=numbers)
    def put(self, number: int) -> None:
        num_tokens = 3 * number + 1
        if self.store.put([block_key(number)], [make_slot(number)], [num_tokens]) == [Outcome.STORED]:
            self.known[number] = num_tokens

    @rule(number=numbers)
    def get(self, number: int) -> None:
        slot = empty_slot()
        (outcome,) = self.store.get([block_key(number)], [slot])
        if outcome.is_hit:
            assert same_block(slot, make_slot(number), self.known[number])
        else:
            assert outcome is Outcome.MISS
            assert number not in self.in_stream

    @rule(number=numbers)
    def remove(self, number: int) -> None:
        removed = self.store.remove([block_key(number)])
        if number in self.in_stream:
            assert removed == [False]
        elif self.store.exists([block_key(number)]) == [False]:
            self.known.pop(number, None)

    @rule(number=numbers)
    @precondition(lambda self: len(self.in_stream) < 3)
    def append(self, number: int) -> None:
        self.store.create_stream(HEADER)
        (block,) = make_blocks(1, number, 3 * number + 1)
        self.store.append("lecture", [renumbered(block, self.num_entries)], {})
        self.store.flush()
        self.num_entries += 1
        self.known[number] = 3 * number + 1
        self.in_stream.add(number)

    @rule()
    @precondition(lambda self: self.num_entries > 0)
    def remove_stream(self) -> None:
        self.store.remove_stream("lecture")
        self.num_entries = 0
        self.in_stream.clear()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = open_store(self.path, host_slots=2, disk_nbytes=self.budget)

    @rule()
    def verify(self) -> None:
        report = self.store.verify()
        assert report.is_clean, report

    @invariant()
    def the_budget_holds(self) -> None:
        assert self.store.stats().usage.extent_file_nbytes <= self.budget


BlocksAgainstDict.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
test_any_sequence_of_calls_agrees_with_a_dict = BlocksAgainstDict.TestCase


def test_a_full_store_makes_room_for_the_next_batch_in_the_commit_of_this_one(tmp_path: Path) -> None:
    with open_store(tmp_path, disk_nbytes=CATALOGUE_NBYTES + 40 * EXTENT_NBYTES) as store:
        for first in range(0, 60, 2):
            assert all(_put(store, first, first + 1))
        evicted = store.stats().disk.evicted_blocks
        assert evicted > 0
        free = store._disk.allocator.file_nbytes - store._disk.allocator.used_nbytes
        assert free >= 2 * EXTENT_NBYTES
        assert all(_put(store, 60, 61))
        assert store.stats().disk.evicted_blocks == evicted + 2
        assert _exists(store, 58, 59, 60, 61) == [True] * 4
