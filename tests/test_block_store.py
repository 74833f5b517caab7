# SPDX-License-Identifier: Apache-2.0
"""What every block store promises, asked of each of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.errors import BusyError, ConfigError, ShapeError
from kvstore.spec import BlockKey
from kvstore.store import Outcome
from kvstore.tiers.block_store import BlockStore
from kvstore.tiers.moving.host_store import HostStore
from tests.store_blocks import LAYOUT, block_key, empty_slot, make_slot, open_store, same_block

IMPLEMENTATIONS: dict[str, Callable[[Path], BlockStore]] = {
    "memory": lambda path: HostStore(LAYOUT, 40 * LAYOUT.slot_nbytes),
    "disk": lambda path: open_store(path, host_slots=2),
    "disk behind memory": lambda path: open_store(path, host_slots=40),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockStore]:
    opened = IMPLEMENTATIONS[request.param](tmp_path)
    yield opened
    opened.close()


def _put(store: BlockStore, *numbers: int, timeout_s: float | None = None) -> list[Outcome]:
    slots = [make_slot(number) for number in numbers]
    return store.put([block_key(n) for n in numbers], slots, [40] * len(numbers), timeout_s=timeout_s)


def _is_there(store: BlockStore, *numbers: int, timeout_s: float | None = None) -> list[bool]:
    slots = [empty_slot() for _ in numbers]
    outcomes = store.get([block_key(number) for number in numbers], slots, timeout_s=timeout_s)
    for number, slot, outcome in zip(numbers, slots, outcomes, strict=True):
        assert outcome.is_hit or outcome is Outcome.MISS
        assert not outcome.is_hit or same_block(slot, make_slot(number))
    return [outcome.is_hit for outcome in outcomes]


def test_what_was_put_comes_back_and_the_rest_is_missing(store: BlockStore) -> None:
    assert store.layout == LAYOUT
    assert _put(store, 1, 2, 3) == [Outcome.STORED] * 3
    assert _is_there(store, 3, 4, 1) == [True, False, True]
    assert store.exists([block_key(number) for number in (1, 4)]) == [True, False]


def test_an_empty_batch_is_done_at_once(store: BlockStore) -> None:
    assert store.put([], [], []) == []
    assert store.get([], []) == []
    assert store.exists([]) == []
    assert store.remove([]) == []
    ticket = store.submit_get([], [])
    assert ticket.done()
    assert ticket.wait() == []


def test_putting_again_changes_nothing(store: BlockStore) -> None:
    assert _put(store, 1, 1) == [Outcome.STORED] * 2
    slot = empty_slot()
    # A key names its content: what is stored stays, whatever comes under its name.
    assert store.put([block_key(1)], [make_slot(9)], [40]) == [Outcome.STORED]
    assert store.get([block_key(1)], [slot])[0].is_hit
    assert same_block(slot, make_slot(1))


def test_one_block_can_be_asked_for_several_times_in_a_batch(store: BlockStore) -> None:
    _put(store, 1, 2)
    assert _is_there(store, 1, 2, 1, 1, 7, 7) == [True] * 4 + [False] * 2


def test_removed_blocks_are_gone(store: BlockStore) -> None:
    _put(store, 1, 2)
    assert store.remove([block_key(1), block_key(5)]) == [True, False]
    assert _is_there(store, 1, 2) == [False, True]
    assert store.remove([block_key(1)]) == [False]


@pytest.mark.parametrize("timeout_s", [0.0, 60.0, None])
def test_time_that_is_up_ends_a_batch_and_enough_time_changes_nothing(
    store: BlockStore, timeout_s: float | None
) -> None:
    expected = Outcome.TIMED_OUT if timeout_s == 0 else Outcome.STORED
    assert _put(store, 1, 2, timeout_s=timeout_s) == [expected] * 2
    _put(store, 1, 2)
    slots = [empty_slot(), empty_slot()]
    outcomes = store.get([block_key(1), block_key(2)], slots, timeout_s=timeout_s)
    assert [outcome.is_hit for outcome in outcomes] == [timeout_s != 0] * 2
    if timeout_s == 0:
        assert outcomes == [Outcome.TIMED_OUT] * 2
        assert not any(slot.any() for slot in slots)


def test_tickets_bring_the_same_outcomes(store: BlockStore) -> None:
    put = store.submit_put([block_key(1)], [make_slot(1)], [40])
    assert put.wait() == [Outcome.STORED]
    assert put.done()
    slots = [empty_slot(), empty_slot()]
    got = store.submit_get([block_key(1), block_key(2)], slots, timeout_s=60)
    outcomes = got.wait(60)
    assert outcomes is not None
    assert outcomes[0].is_hit
    assert outcomes[1] is Outcome.MISS
    assert same_block(slots[0], make_slot(1))
    got.cancel()  # too late: what has ended stays as it is
    assert got.wait() == outcomes


def test_a_cancelled_batch_ends_and_leaves_the_store_usable(store: BlockStore) -> None:
    numbers = range(30)
    keys = [block_key(number) for number in numbers]
    put = store.submit_put(keys, [make_slot(number) for number in numbers], [40] * 30)
    put.cancel()
    stored = put.wait(60)
    assert stored is not None
    assert set(stored) <= {Outcome.STORED, Outcome.CANCELLED}
    assert _is_there(store, *numbers) == [outcome is Outcome.STORED for outcome in stored]
    _put(store, *numbers)
    slots = [empty_slot() for _ in numbers]
    got = store.submit_get(keys, slots)
    got.cancel()
    outcomes = got.wait(60)
    assert outcomes is not None
    for number, slot, outcome in zip(numbers, slots, outcomes, strict=True):
        assert same_block(slot, make_slot(number)) if outcome.is_hit else outcome is Outcome.CANCELLED
    assert all(_is_there(store, *numbers))


def test_threads_share_a_store(store: BlockStore) -> None:
    num_removed = threading.Semaphore(0)

    def work(seed: int) -> None:
        for turn in range(12):
            number = (5 * seed + 7 * turn) % 16
            assert set(_put(store, number, number + 1)) == {Outcome.STORED}
            _is_there(store, number, number + 1, timeout_s=60 if turn % 2 else None)
            if store.remove([block_key(number)]) == [True]:
                num_removed.release()

    with ThreadPoolExecutor(4) as threads:
        for job in [threads.submit(work, seed) for seed in range(4)]:
            job.result(60)
    assert num_removed.acquire(blocking=False)
    _put(store, *range(17))
    assert all(_is_there(store, *range(17)))


@pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
def test_keys_of_another_length_are_refused(store: BlockStore, key: bytes) -> None:
    keys = [BlockKey(key)]
    for call in (
        lambda: store.put(keys, [make_slot(1)], [40]),
        lambda: store.get(keys, [empty_slot()]),
        lambda: store.submit_get(keys, [empty_slot()]),
        lambda: store.exists(keys),
        lambda: store.remove(keys),
    ):
        with pytest.raises(ShapeError):
            call()


def test_a_wrong_argument_is_refused_before_anything_moves(store: BlockStore) -> None:
    good, keys = make_slot(1), [block_key(1), block_key(2)]
    for slots, tokens in (([good], [40, 40]), ([good, good[:-1]], [40, 40]), ([good, good], [40, 41])):
        with pytest.raises(ShapeError):
            store.put(keys, slots, tokens)
    with pytest.raises(ShapeError):
        store.get(keys, [empty_slot()])
    for timeout_s in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="timeout_s"):
            store.get(keys, [good, good], timeout_s=timeout_s)
    assert store.exists(keys) == [False, False]


def test_closing_finishes_what_was_submitted_and_is_done_once(store: BlockStore) -> None:
    ticket = store.submit_put([block_key(1)], [make_slot(1)], [40], timeout_s=60)
    store.close()
    assert ticket.done()
    assert ticket.wait() == [Outcome.STORED]
    store.close()
    with pytest.raises(BusyError):
        store.exists([block_key(1)])
