# SPDX-License-Identifier: Apache-2.0
"""A disk that stalls: what needs no disk goes on, and what nobody waits for any more is given up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.store import FetchRequest, Outcome
from tests.stalled_disk import HANG_S, NUM_BLOCKS, SlowDisk, run_on_disk, stored
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    LAYOUT,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    requests_for,
    same_block,
)


def reads_that_are_stuck_hold_up_nothing_that_is_in_memory(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder, host_slots=6) as store:
        assert store.get([block_key(7)], [empty_slot()])[0].is_hit
        disk.set(reads_stall=True)
        stuck = [store.submit_get([block_key(number)], [empty_slot()], timeout_s=0.1) for number in range(4)]
        load = store.load_layers([block_key(4)], [empty_slot()])
        assert [ticket.wait() for ticket in stuck] == [[Outcome.TIMED_OUT]] * 4
        slot = empty_slot()
        assert store.get([block_key(7)], [slot], timeout_s=HANG_S) == [Outcome.HOST]
        assert same_block(slot, make_slot(7))
        assert store.submit_get([block_key(7)], [empty_slot()]).wait(HANG_S) == [Outcome.HOST]
        mixed = store.submit_get([block_key(7), block_key(5)], [empty_slot(), empty_slot()], timeout_s=1.0)
        assert mixed.wait() == [Outcome.HOST, Outcome.TIMED_OUT]
        request = FetchRequest(block_key(7), empty_slot())
        assert store.fetch([request], timeout_s=HANG_S).outcomes == [Outcome.HOST]
        assert store.put([block_key(77)], [make_slot(77)], [40], timeout_s=HANG_S) == [Outcome.STORED]
        disk.set()
        assert load.wait(0, HANG_S) == [Outcome.DISK]


def a_cancelled_load_leaves_slots_alone(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder) as store:
        disk.set(reads_stall=True)
        slots = [empty_slot(), empty_slot()]
        load = store.load_layers([block_key(0), block_key(1)], slots, group_layers=1)
        flights = store._moving().fetcher._flights._flights
        while not flights:
            time.sleep(0.005)
        assert load.wait(0, 0.05) is None
        load.cancel()
        for layer in range(LAYOUT.spec.num_layers):
            assert load.wait(layer, HANG_S) == [Outcome.CANCELLED] * 2
        disk.set()
        store._moving().mover.close()
        assert not any(slot.any() for slot in slots)


def what_is_removed_while_it_is_read_does_not_come_back(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder, host_slots=6) as store:
        disk.set(reads_stall=True)
        slot = empty_slot()
        get, prefetch = store.submit_get([block_key(0)], [slot]), store.prefetch([block_key(1)])
        flights = store._moving().fetcher._flights._flights
        while not flights:
            time.sleep(0.005)
        time.sleep(0.1)  # both are looked up, and read
        assert store.remove([block_key(0), block_key(1)]) == [True, True]
        disk.set()
        assert get.wait(HANG_S) in ([Outcome.DISK], [Outcome.MISS])
        prefetch.wait(HANG_S)
        assert store.exists([block_key(0), block_key(1)]) == [False, False]
        assert store.get([block_key(0), block_key(1)], [slot, slot]) == [Outcome.MISS] * 2


def an_interrupted_append_is_no_part_of_the_next(disk: SlowDisk, folder: Path) -> None:
    with open_store(folder, host_slots=4) as store:
        store.create_stream(HEADER)
        for trial, num_blocks in enumerate((10, 6)):
            first = len(store.manifest("lecture").entries)
            disk.set(writes_stall=True)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                store.append("lecture", make_blocks(num_blocks, first), {"next": -1})
            disk.set()
            assert len(store.manifest("lecture").entries) == first
            store.append("lecture", make_blocks(5, first), {"next": first + 5})
            store.flush()
            assert store.manifest("lecture").cursor == {"next": 5 * (trial + 1)}
        assert store.fetch(requests_for(make_blocks(10))).outcomes.count(Outcome.MISS) == 0
        assert store.verify().is_clean
        assert store.stats().host_slots_used == 4
        leases = [store._moving().host.try_reserve(block_key(100 + number)) for number in range(4)]
        assert None not in leases, "no slot is lost"


def what_nobody_waits_for_any_more_is_not_read(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder) as store:
        disk.set(reads_stall=True)
        for number in range(NUM_BLOCKS):
            assert store.fetch([FetchRequest(block_key(number), empty_slot())], 0.05).outcomes == [Outcome.TIMED_OUT]
        disk.set()
        store._moving().mover.close()
        assert store.stats().disk.read_nbytes == 4 * EXTENT_NBYTES, "four reads had begun"


def cancelled_puts_let_others_have_their_place(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder) as store:
        disk.set(writes_stall=True)
        keys, slots = [block_key(number) for number in range(100, 106)], [make_slot(1)] * 6
        puts = [store.submit_put(keys, slots, [40] * 6, timeout_s=3600.0) for _ in range(4)]
        time.sleep(0.2)
        for put in puts:
            put.cancel()
        assert [put.wait(HANG_S) for put in puts] == [[Outcome.CANCELLED] * 6] * 4
        assert store.get([block_key(0)], [empty_slot()], timeout_s=HANG_S)[0].is_hit
        disk.set()
        assert store.put([block_key(110)], [make_slot(110)], [40], timeout_s=HANG_S) == [Outcome.STORED]


CASES = [
    reads_that_are_stuck_hold_up_nothing_that_is_in_memory,
    a_cancelled_load_leaves_slots_alone,
    what_is_removed_while_it_is_read_does_not_come_back,
    an_interrupted_append_is_no_part_of_the_next,
    what_nobody_waits_for_any_more_is_not_read,
    cancelled_puts_let_others_have_their_place,
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_on_disk(__name__, tmp_path_factory.mktemp("slow"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_on_a_stalled_disk(case: Callable[[SlowDisk, Path], None], output: str) -> None:
    assert f"{case.__name__} holds" in output, output
