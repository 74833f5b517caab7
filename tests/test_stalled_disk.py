# SPDX-License-Identifier: Apache-2.0
"""A disk that stalls: deadlines hold, late bytes touch nothing, who waits for another's read is not lost with it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvstore.errors import BusyError
from kvstore.store import FetchRequest, Outcome
from tests.stalled_disk import HANG_S, NUM_BLOCKS, SlowDisk, run_on_disk, stored
from tests.store_blocks import HEADER, LAYOUT, block_key, empty_slot, make_blocks, make_slot, open_store, same_block
from tests.test_face import CPU, forward, open_folder, still


def late_reads_leave_slots_alone(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder) as store:
        disk.set(reads_stall=True)
        slots = [empty_slot() for _ in range(3)]
        began_s = time.monotonic()
        outcomes = store.get([block_key(0), block_key(99), block_key(1)], slots, timeout_s=0.2)
        assert outcomes == [Outcome.TIMED_OUT] * 3
        assert time.monotonic() - began_s < HANG_S
        ticket = store.submit_get([block_key(2)], [slots[0]])
        assert ticket.wait(0.1) is None
        assert not ticket.done()
        ticket.cancel()
        assert ticket.wait(0) == [Outcome.CANCELLED]
        disk.set()
        after = empty_slot()
        assert store.get([block_key(0)], [after], timeout_s=HANG_S)[0].is_hit
        assert same_block(after, make_slot(0))
        store._moving().mover.close()  # every late read has ended
        assert not any(slot.any() for slot in slots)


def late_writes_free_the_slots(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder, host_slots=4) as store:
        disk.set(writes_stall=True)
        numbers = range(20, 30)  # more than the host tier has slots
        slots = [make_slot(number) for number in numbers]
        keys = [block_key(number) for number in numbers]
        assert store.put(keys, slots, [40] * 10, timeout_s=0.2) == [Outcome.TIMED_OUT] * 10
        for slot in slots:
            slot.zero_()  # the caller has them back: what is stored of them is what was put
        waiting = store.submit_put([block_key(40)], [make_slot(40)], [40])
        waiting.cancel()  # it has not begun: the write before it stalls
        assert waiting.wait(HANG_S) == [Outcome.CANCELLED]
        disk.set()
        assert store.put([block_key(41)], [make_slot(41)], [40], timeout_s=HANG_S) == [Outcome.STORED]
        found = [empty_slot() for _ in numbers]
        for number, slot, outcome in zip(numbers, found, store.get(keys, found), strict=True):
            assert outcome is Outcome.MISS or same_block(slot, make_slot(number))
        assert store.exists([block_key(40)]) == [False]
        assert store.verify().is_clean


def closing_waits_for_a_fetch_that_is_under_way(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder) as store, ThreadPoolExecutor(2) as threads:
        disk.set(reads_stall=True)
        slots = [empty_slot() for _ in range(NUM_BLOCKS)]
        job = threads.submit(store.get, [block_key(number) for number in range(NUM_BLOCKS)], slots)
        while len(store._moving().fetcher._flights._flights) < NUM_BLOCKS - 2:
            time.sleep(0.005)
        closing = threads.submit(store.close)
        time.sleep(0.2)
        assert not closing.done()
        with pytest.raises(BusyError):
            store.get([block_key(0)], [empty_slot()])
        disk.set()
        assert all(outcome.is_hit for outcome in job.result(HANG_S))
        assert all(same_block(slot, make_slot(number)) for number, slot in enumerate(slots))
        closing.result(HANG_S)


def two_askers_cause_one_read(disk: SlowDisk, folder: Path) -> None:
    for layers in (None, range(1, 2)):
        with stored(disk, folder) as store, ThreadPoolExecutor(6) as threads:
            disk.set(reads_stall=True)
            slots = [[empty_slot(), empty_slot()] for _ in range(6)]
            batches = [[FetchRequest(block_key(n), slot, layers) for n, slot in enumerate(pair)] for pair in slots]
            jobs = [threads.submit(store.fetch, batch) for batch in batches]
            flights = store._moving().fetcher._flights._flights
            while sum(len(flight.seats) for flight in list(flights.values())) < 12:
                time.sleep(0.005)
            disk.set()
            assert [job.result(HANG_S).outcomes for job in jobs] == [[Outcome.DISK] * 2] * 6
            for pair in slots:
                for number, slot in enumerate(pair):
                    if layers is None:
                        assert same_block(slot, make_slot(number))
                    else:
                        assert (LAYOUT.keys(slot)[1] == LAYOUT.keys(make_slot(number))[1]).any()
                        assert not LAYOUT.keys(slot)[0].any()
            stats = store.stats().disk
            assert (stats.read_blocks, stats.shared_reads) == (2, 10)


def questions_in_inference_mode_share_a_read(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder) as store, ThreadPoolExecutor(2) as threads:

        def ask() -> list[torch.Tensor]:
            with torch.inference_mode():
                slots = [torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8) for _ in range(2)]
                requests = [FetchRequest(block_key(number), slot) for number, slot in enumerate(slots)]
                assert store.fetch(requests).outcomes == [Outcome.DISK] * 2
                return slots

        disk.set(reads_stall=True)
        jobs = [threads.submit(ask) for _ in range(2)]
        flights = store._moving().fetcher._flights._flights
        while sum(len(flight.seats) for flight in list(flights.values())) < 4:
            time.sleep(0.005)
        disk.set()
        for job in jobs:
            assert [same_block(slot, make_slot(number)) for number, slot in enumerate(job.result(HANG_S))] == [True] * 2


def the_second_asker_outlives_the_first(disk: SlowDisk, folder: Path) -> None:
    for ends_early in ("timed out", "cancelled"):
        with stored(disk, folder) as store, ThreadPoolExecutor(1) as threads:
            disk.set(reads_stall=True)
            first, second = empty_slot(), empty_slot()
            timeout_s = 0.3 if ends_early == "timed out" else None
            ticket = store.submit_get([block_key(3)], [first], timeout_s=timeout_s)
            flights = store._moving().fetcher._flights._flights
            while not flights:
                time.sleep(0.005)
            job = threads.submit(store.get, [block_key(3)], [second])
            while len(next(iter(flights.values())).seats) < 2:
                time.sleep(0.005)
            if ends_early == "cancelled":
                ticket.cancel()
            assert ticket.wait(HANG_S) == [Outcome(ends_early)]
            disk.set()
            assert job.result(HANG_S)[0].is_hit
            assert same_block(second, make_slot(3))
            assert not first.any()


def the_second_asker_goes_on_when_the_first_fails(disk: SlowDisk, folder: Path) -> None:
    with stored(disk, folder) as store, ThreadPoolExecutor(2) as threads:
        (extents,) = (folder / "extents").iterdir()
        disk.set(reads_stall=True)
        slots = [empty_slot(), empty_slot()]
        jobs = [threads.submit(store.get, [block_key(4)], [slot]) for slot in slots]
        flights = store._moving().fetcher._flights._flights
        while not flights or len(next(iter(flights.values())).seats) < 2:
            time.sleep(0.005)
        whole = extents.read_bytes()
        os.truncate(extents, 4096)
        disk.set()
        assert [job.result(HANG_S) for job in jobs] == [[Outcome.DAMAGED]] * 2
        extents.write_bytes(whole)
        assert store.get([block_key(4)], slots[:1]) == [Outcome.DISK]


def appends_do_not_wait_until_the_host_tier_is_full(disk: SlowDisk, folder: Path) -> None:
    with open_store(folder, host_slots=8) as store, ThreadPoolExecutor(1) as threads:
        store.create_stream(HEADER)
        disk.set(writes_stall=True)
        for number in range(8):
            store.append("lecture", make_blocks(1, number), {"next": number + 1})
        ninth = threads.submit(store.append, "lecture", make_blocks(1, 8), {"next": 9})
        time.sleep(0.2)
        assert not ninth.done(), "eight slots hold blocks that are not written"
        disk.set()
        ninth.result(HANG_S)
        store.flush()
        assert len(store.manifest("lecture").entries) == 9


def a_question_is_answered_from_what_came_in_time(disk: SlowDisk, folder: Path) -> None:
    with open_folder(folder) as store:
        stream = store.stream("s", window_tokens=16)
        stream.bind(still, CPU)
        for first in range(0, 64, 16):
            forward(stream, first, 16)
        stream.commit()
    answers, lost = [], []
    for timeout_s, is_stalled in ((None, False), (0.3, True), (HANG_S, False)):
        with open_folder(folder) as store:
            stream = store.stream("s", load_timeout_s=timeout_s, window_tokens=16, budget_tokens=32)
            stream.bind(still, CPU)  # reads the sinks and the window
            with stream.recalling():
                forward(stream, 0, 3)
                disk.set(reads_stall=is_stalled)
            with stream.asking():
                answers.append(forward(stream, 0, 3))
            disk.set()
            lost.append(set(stream.last.load.lost.values()))
    assert lost == [set(), {"it did not come within 0.3 s"}, set()]
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])
    assert answers[1].isfinite().all()


CASES = [
    late_reads_leave_slots_alone,
    late_writes_free_the_slots,
    closing_waits_for_a_fetch_that_is_under_way,
    two_askers_cause_one_read,
    questions_in_inference_mode_share_a_read,
    the_second_asker_outlives_the_first,
    the_second_asker_goes_on_when_the_first_fails,
    appends_do_not_wait_until_the_host_tier_is_full,
    a_question_is_answered_from_what_came_in_time,
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_on_disk(__name__, tmp_path_factory.mktemp("slow"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_on_a_stalled_disk(case: Callable[[SlowDisk, Path], None], output: str) -> None:
    assert f"{case.__name__} holds" in output, output
