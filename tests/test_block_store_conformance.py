# SPDX-License-Identifier: Apache-2.0
"""What every block store promises, checked against each implementation of tests/block_stores.py."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.block_store import BlockStore
from tests.block_stores import IMPLEMENTATIONS
from tests.store_blocks import LAYOUT, block_key, empty_slot, make_slot, same_block

_PATIENCE_S = 60.0
_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module", params=sorted(IMPLEMENTATIONS))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockStore]:
    """One store for all tests here: each uses blocks of its own."""
    with IMPLEMENTATIONS[request.param](tmp_path_factory.mktemp("store")) as opened:
        yield opened


def fresh(count: int) -> list[int]:
    """Numbers of blocks that no other test has."""
    return list(itertools.islice(_NUMBERS, count))


def keys_of(numbers: list[int]) -> list[BlockKey]:
    return [block_key(number) for number in numbers]


def slots_of(numbers: list[int]) -> list[Tensor]:
    return [make_slot(number) for number in numbers]


def empty_slots(count: int) -> list[Tensor]:
    return [empty_slot() for _ in range(count)]


def put(store: BlockStore, numbers: list[int], num_tokens: int = 40) -> list[Outcome]:
    return store.put(keys_of(numbers), slots_of(numbers), [num_tokens] * len(numbers))


def test_it_says_which_blocks_fit(store: BlockStore) -> None:
    assert store.layout == LAYOUT


def test_what_was_put_comes_back_bit_for_bit(store: BlockStore) -> None:
    numbers = fresh(5)
    assert put(store, numbers) == [Outcome.STORED] * 5
    slots = empty_slots(5)
    assert all(outcome.is_hit for outcome in store.get(keys_of(numbers), slots))
    assert all(same_block(slot, make_slot(number)) for slot, number in zip(slots, numbers, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 2, 39, 40])
def test_short_blocks_come_back_too(store: BlockStore, num_tokens: int) -> None:
    (number,) = numbers = fresh(1)
    assert put(store, numbers, num_tokens) == [Outcome.STORED]
    slot = empty_slot()
    assert store.get(keys_of(numbers), [slot])[0].is_hit
    assert same_block(slot, make_slot(number), num_tokens)


def test_a_block_that_is_not_there_is_a_miss_and_costs_its_neighbours_nothing(store: BlockStore) -> None:
    first, missing, last = fresh(3)
    put(store, [first, last])
    slots = empty_slots(3)
    outcomes = store.get(keys_of([first, missing, last]), slots)
    assert [outcome.is_hit for outcome in outcomes] == [True, False, True]
    assert outcomes[1] is Outcome.MISS
    assert same_block(slots[0], make_slot(first))
    assert same_block(slots[2], make_slot(last))


def test_putting_again_is_no_fault_and_changes_nothing(store: BlockStore) -> None:
    (number,) = numbers = fresh(1)
    assert put(store, numbers) == put(store, numbers) == [Outcome.STORED]
    slot = empty_slot()
    assert store.get(keys_of(numbers), [slot])[0].is_hit
    assert same_block(slot, make_slot(number))


def test_one_batch_may_name_a_block_twice(store: BlockStore) -> None:
    (number,) = fresh(1)
    assert put(store, [number, number]) == [Outcome.STORED] * 2
    slots = empty_slots(2)
    assert all(outcome.is_hit for outcome in store.get(keys_of([number, number]), slots))
    assert all(same_block(slot, make_slot(number)) for slot in slots)


def test_it_says_what_exists(store: BlockStore) -> None:
    there, missing = fresh(2)
    put(store, [there])
    assert store.exists(keys_of([missing, there])) == [False, True]


def test_what_was_removed_is_gone_and_can_be_put_again(store: BlockStore) -> None:
    numbers = fresh(2)
    there = numbers[0]
    put(store, [there])
    assert store.remove(keys_of(numbers)) == [True, False]
    assert store.exists(keys_of(numbers)) == [False, False]
    assert store.get(keys_of([there]), empty_slots(1)) == [Outcome.MISS]
    assert put(store, [there]) == [Outcome.STORED]
    assert store.get(keys_of([there]), empty_slots(1))[0].is_hit


def test_empty_batches_are_fine(store: BlockStore) -> None:
    assert store.put([], [], []) == []
    assert store.get([], []) == []
    assert store.submit_put([], [], []).wait() == []
    assert store.submit_get([], []).wait() == []
    assert store.exists([]) == []
    assert store.remove([]) == []


def test_a_batch_larger_than_any_buffer_comes_back(store: BlockStore) -> None:
    numbers = fresh(300)
    assert set(put(store, numbers)) == {Outcome.STORED}
    slots = empty_slots(300)
    assert all(outcome.is_hit for outcome in store.get(keys_of(numbers), slots))
    assert all(same_block(slot, make_slot(number)) for slot, number in zip(slots, numbers, strict=True))


@pytest.mark.parametrize(
    ("key", "slot", "num_tokens"),
    [
        (b"short", make_slot(0), 40),
        (block_key(0), make_slot(0)[:-1], 40),
        (block_key(0), make_slot(0).view(torch.int16), 40),
        (block_key(0), make_slot(0), 0),
        (block_key(0), make_slot(0), 41),
    ],
    ids=["key", "slot-length", "slot-dtype", "no-tokens", "too-many-tokens"],
)
def test_wrong_arguments_are_refused_before_anything_moves(
    store: BlockStore, key: bytes, slot: Tensor, num_tokens: int
) -> None:
    (number,) = fresh(1)
    with pytest.raises(ShapeError):
        store.put([block_key(number), BlockKey(key)], [make_slot(number), slot], [40, num_tokens])
    with pytest.raises(ShapeError):
        store.submit_put([block_key(number), BlockKey(key)], [make_slot(number), slot], [40, num_tokens])
    assert store.exists([block_key(number)]) == [False]


def test_unequal_lengths_are_refused(store: BlockStore) -> None:
    numbers = fresh(2)
    with pytest.raises(ShapeError):
        store.put(keys_of(numbers), slots_of(numbers), [40])
    with pytest.raises((ShapeError, ValueError)):
        store.get(keys_of(numbers), empty_slots(1))
    with pytest.raises(ShapeError):
        store.exists([BlockKey(b"short")])
    with pytest.raises(ShapeError):
        store.remove([BlockKey(b"short")])


def test_tickets_end_with_the_outcomes(store: BlockStore) -> None:
    numbers = fresh(8)
    ticket = store.submit_put(keys_of(numbers), slots_of(numbers), [40] * 8)
    assert ticket.wait(_PATIENCE_S) == [Outcome.STORED] * 8
    assert ticket.done()
    slots = empty_slots(8)
    ticket = store.submit_get(keys_of(numbers), slots)
    outcomes = ticket.wait(_PATIENCE_S)
    assert outcomes is not None
    assert all(outcome.is_hit for outcome in outcomes)
    assert ticket.wait() == outcomes, "a second look sees the same"
    assert all(same_block(slot, make_slot(number)) for slot, number in zip(slots, numbers, strict=True))


def test_many_tickets_may_be_under_way(store: BlockStore) -> None:
    numbers = fresh(40)
    puts = [store.submit_put([block_key(n)], [make_slot(n)], [40]) for n in numbers]
    assert all(ticket.wait(_PATIENCE_S) == [Outcome.STORED] for ticket in puts)
    slots = empty_slots(40)
    gets = [store.submit_get([block_key(n)], [slot]) for n, slot in zip(numbers, slots, strict=True)]
    for number, slot, ticket in zip(numbers, slots, gets, strict=True):
        outcomes = ticket.wait(_PATIENCE_S)
        assert outcomes is not None
        assert outcomes[0].is_hit
        assert same_block(slot, make_slot(number))


def test_what_was_cancelled_has_an_outcome_and_leaves_its_slot_alone(store: BlockStore) -> None:
    numbers = fresh(100)
    put(store, numbers)
    slots = empty_slots(100)
    ticket = store.submit_get(keys_of(numbers), slots)
    ticket.cancel()
    outcomes = ticket.wait(_PATIENCE_S)
    assert outcomes is not None
    before = [slot.clone() for slot in slots]
    store.get(keys_of(numbers), empty_slots(100))  # lets anything that comes late come
    for number, slot, kept, outcome in zip(numbers, slots, before, outcomes, strict=True):
        assert outcome is Outcome.CANCELLED or outcome.is_hit, outcome
        assert torch.equal(slot, kept), "written to after its outcome was known"
        assert outcome is Outcome.CANCELLED or same_block(slot, make_slot(number))


@pytest.mark.parametrize("timeout_s", [0.0, 0.0005])
def test_calls_without_time_end_and_leave_slots_alone(store: BlockStore, timeout_s: float) -> None:
    numbers = fresh(100)
    put(store, numbers[:50])
    slots = empty_slots(100)
    outcomes = store.get(keys_of(numbers), slots, timeout_s=timeout_s)
    before = [slot.clone() for slot in slots]
    store.get(keys_of(numbers), empty_slots(100))
    for number, slot, kept, outcome in zip(numbers, slots, before, outcomes, strict=True):
        assert outcome in (Outcome.TIMED_OUT, Outcome.MISS) or outcome.is_hit, outcome
        assert torch.equal(slot, kept), "written to after its outcome was known"
        assert not outcome.is_hit or same_block(slot, make_slot(number))
    outcomes = store.put(keys_of(numbers), slots_of(numbers), [40] * 100, timeout_s=timeout_s)
    assert set(outcomes) <= {Outcome.TIMED_OUT, Outcome.STORED}
    assert set(put(store, numbers)) == {Outcome.STORED}, "they can be put with more time"


def test_a_slot_may_be_used_again_when_its_put_has_ended(store: BlockStore) -> None:
    numbers = fresh(60)
    slots = slots_of(numbers)
    outcomes = store.put(keys_of(numbers), slots, [40] * 60, timeout_s=0.002)
    for slot in slots:
        slot.fill_(255)
    found = empty_slots(60)
    reads = store.get(keys_of(numbers), found)
    for number, slot, written, read in zip(numbers, found, outcomes, reads, strict=True):
        assert read.is_hit or written is not Outcome.STORED
        assert not read.is_hit or same_block(slot, make_slot(number)), "what was stored is not what was given"


def test_threads_share_it(store: BlockStore) -> None:
    shared = fresh(10)
    failures: list[str] = []

    def work(own: list[int]) -> None:
        for _ in range(3):
            put(store, own + shared)
            numbers = shared + own
            slots = empty_slots(len(numbers))
            for number, slot, outcome in zip(numbers, slots, store.get(keys_of(numbers), slots), strict=True):
                if not outcome.is_hit or not same_block(slot, make_slot(number)):
                    failures.append(f"block {number}: {outcome}")

    threads = [threading.Thread(target=work, args=(fresh(10),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


@pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS))
def test_closing_twice_is_fine(name: str, tmp_path: Path) -> None:
    with IMPLEMENTATIONS[name](tmp_path) as opened:
        opened.submit_put([block_key(0)], [make_slot(0)], [40])
        opened.close()
        opened.close()
