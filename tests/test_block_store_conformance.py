# SPDX-License-Identifier: Apache-2.0
"""What every block store promises of blocks, checked against each implementation of tests/block_stores.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.block_store import BlockStore
from tests.block_stores import IMPLEMENTATIONS, empty_slots, fresh, keys_of, put, slots_of
from tests.store_blocks import LAYOUT, block_key, empty_slot, make_slot, same_block


@pytest.fixture(scope="module", params=sorted(IMPLEMENTATIONS))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockStore]:
    """One store for all tests here: each uses blocks of its own."""
    with IMPLEMENTATIONS[request.param](tmp_path_factory.mktemp("store")) as opened:
        yield opened


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
    # A key names its content: what is stored stays, whatever comes under its name.
    assert store.put(keys_of(numbers), [make_slot(number + 1)], [40]) == [Outcome.STORED]
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
    assert store.remove(keys_of([there])) == [False]
    assert put(store, [there]) == [Outcome.STORED]
    assert store.get(keys_of([there]), empty_slots(1))[0].is_hit


def test_empty_batches_are_fine(store: BlockStore) -> None:
    assert store.put([], [], []) == []
    assert store.get([], []) == []
    assert store.submit_put([], [], []).wait() == []
    ticket = store.submit_get([], [])
    assert ticket.done()
    assert ticket.wait() == []
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
    for timeout_s in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="timeout_s"):
            store.get([block_key(number)], empty_slots(1), timeout_s=timeout_s)
    assert store.exists([block_key(number)]) == [False]


def test_unequal_lengths_are_refused(store: BlockStore) -> None:
    numbers = fresh(2)
    with pytest.raises(ShapeError):
        store.put(keys_of(numbers), slots_of(numbers), [40])
    with pytest.raises((ShapeError, ValueError)):
        store.get(keys_of(numbers), empty_slots(1))


@pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
def test_keys_of_another_length_are_refused(store: BlockStore, key: bytes) -> None:
    keys = [BlockKey(key)]
    for call in (
        lambda: store.get(keys, empty_slots(1)),
        lambda: store.submit_get(keys, empty_slots(1)),
        lambda: store.exists(keys),
        lambda: store.remove(keys),
    ):
        with pytest.raises(ShapeError):
            call()
