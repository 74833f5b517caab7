# SPDX-License-Identifier: Apache-2.0
"""What every block store promises of tickets, deadlines, threads and closing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from kvstore.errors import BusyError
from kvstore.tiers.base import Outcome
from kvstore.tiers.block_store import BlockStore
from tests.block_stores import IMPLEMENTATIONS, PATIENCE_S, empty_slots, fresh, keys_of, put, slots_of
from tests.store_blocks import block_key, make_slot, same_block


@pytest.fixture(scope="module", params=sorted(IMPLEMENTATIONS))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockStore]:
    """One store for all tests here: each uses blocks of its own."""
    with IMPLEMENTATIONS[request.param](tmp_path_factory.mktemp("store")) as opened:
        yield opened


def test_tickets_end_with_the_outcomes(store: BlockStore) -> None:
    numbers = fresh(8)
    ticket = store.submit_put(keys_of(numbers), slots_of(numbers), [40] * 8)
    assert ticket.wait(PATIENCE_S) == [Outcome.STORED] * 8
    assert ticket.done()
    slots = empty_slots(8)
    ticket = store.submit_get(keys_of(numbers), slots)
    outcomes = ticket.wait(PATIENCE_S)
    assert outcomes is not None
    assert all(outcome.is_hit for outcome in outcomes)
    ticket.cancel()  # too late: what has ended stays as it is
    assert ticket.wait() == outcomes, "a second look sees the same"
    assert all(same_block(slot, make_slot(number)) for slot, number in zip(slots, numbers, strict=True))


def test_many_tickets_may_be_under_way(store: BlockStore) -> None:
    numbers = fresh(40)
    puts = [store.submit_put([block_key(n)], [make_slot(n)], [40]) for n in numbers]
    assert all(ticket.wait(PATIENCE_S) == [Outcome.STORED] for ticket in puts)
    slots = empty_slots(40)
    gets = [store.submit_get([block_key(n)], [slot]) for n, slot in zip(numbers, slots, strict=True)]
    for number, slot, ticket in zip(numbers, slots, gets, strict=True):
        outcomes = ticket.wait(PATIENCE_S)
        assert outcomes is not None
        assert outcomes[0].is_hit
        assert same_block(slot, make_slot(number))


def test_what_was_cancelled_has_an_outcome_and_leaves_its_slot_alone(store: BlockStore) -> None:
    numbers = fresh(100)
    put(store, numbers)
    slots = empty_slots(100)
    ticket = store.submit_get(keys_of(numbers), slots)
    ticket.cancel()
    outcomes = ticket.wait(PATIENCE_S)
    assert outcomes is not None
    before = [slot.clone() for slot in slots]
    store.get(keys_of(numbers), empty_slots(100))  # lets anything that comes late come
    for number, slot, kept, outcome in zip(numbers, slots, before, outcomes, strict=True):
        assert outcome is Outcome.CANCELLED or outcome.is_hit, outcome
        assert torch.equal(slot, kept), "written to after its outcome was known"
        assert outcome is Outcome.CANCELLED or same_block(slot, make_slot(number))


def test_a_cancelled_put_says_what_is_stored(store: BlockStore) -> None:
    numbers = fresh(60)
    ticket = store.submit_put(keys_of(numbers), slots_of(numbers), [40] * 60)
    ticket.cancel()
    stored = ticket.wait(PATIENCE_S)
    assert stored is not None
    assert set(stored) <= {Outcome.STORED, Outcome.CANCELLED}
    found = empty_slots(60)
    for number, slot, written, read in zip(numbers, found, stored, store.get(keys_of(numbers), found), strict=True):
        assert read.is_hit or written is Outcome.CANCELLED
        assert not read.is_hit or same_block(slot, make_slot(number))
    assert set(put(store, numbers)) == {Outcome.STORED}


def test_no_time_ends_a_batch_at_once_and_enough_time_changes_nothing(store: BlockStore) -> None:
    numbers = fresh(2)
    assert store.put(keys_of(numbers), slots_of(numbers), [40] * 2, timeout_s=0.0) == [Outcome.TIMED_OUT] * 2
    written = store.put(keys_of(numbers), slots_of(numbers), [40] * 2, timeout_s=PATIENCE_S)
    assert written == [Outcome.STORED] * 2
    slots = empty_slots(2)
    assert store.get(keys_of(numbers), slots, timeout_s=0.0) == [Outcome.TIMED_OUT] * 2
    assert not any(slot.any() for slot in slots)
    assert all(outcome.is_hit for outcome in store.get(keys_of(numbers), slots, timeout_s=PATIENCE_S))


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
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def test_threads_may_remove_what_others_put(store: BlockStore) -> None:
    numbers = fresh(17)

    def work(seed: int) -> int:
        num_removed = 0
        for turn in range(12):
            first = (5 * seed + 7 * turn) % 16
            pair = numbers[first : first + 2]
            assert set(put(store, pair)) == {Outcome.STORED}
            slots = empty_slots(2)
            outcomes = store.get(keys_of(pair), slots, timeout_s=PATIENCE_S if turn % 2 else None)
            for number, slot, outcome in zip(pair, slots, outcomes, strict=True):
                assert same_block(slot, make_slot(number)) if outcome.is_hit else outcome is Outcome.MISS
            num_removed += store.remove(keys_of(pair[:1])) == [True]
        return num_removed

    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(work, seed) for seed in range(4)]
        assert sum(job.result(PATIENCE_S) for job in jobs) > 0
    put(store, numbers)
    assert store.exists(keys_of(numbers)) == [True] * 17


@pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS))
def test_closing_finishes_what_was_submitted_and_is_done_once(name: str, tmp_path: Path) -> None:
    with IMPLEMENTATIONS[name](tmp_path) as opened:
        ticket = opened.submit_put([block_key(0)], [make_slot(0)], [40], timeout_s=PATIENCE_S)
        opened.close()
        assert ticket.done()
        assert ticket.wait() == [Outcome.STORED]
        opened.close()
        with suppress(BusyError):  # a remote tier says that nothing can be asked for
            assert opened.exists([block_key(0)]) == [False]
