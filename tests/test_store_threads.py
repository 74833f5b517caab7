# SPDX-License-Identifier: Apache-2.0
"""Several threads on one store: readers, a producer and an evicting cache, all at once."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvstore.errors import BusyError
from kvstore.store import Access, Outcome, Store
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    same_block,
)

HANG_S = 60.0
NUM_BLOCKS = 40
PLAIN = range(1000, 1030)
BUDGET_NBYTES = (1 << 19) + (NUM_BLOCKS + 10) * EXTENT_NBYTES


def _produce(store: Store) -> None:
    for index in range(NUM_BLOCKS):
        store.append("lecture", make_blocks(1, index), {"next": index + 1})
        if index % 5 == 4:
            store.flush()
            assert len(store.manifest("lecture").entries) >= index + 1


def _cache(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        number = rng.choice(PLAIN)
        store.put([block_key(number)], [make_slot(number)], [40])
        store.remove([block_key(rng.choice(PLAIN))])


def _read(store: Store, seed: int) -> int:
    rng = random.Random(seed)
    num_hits = 0
    for _ in range(60):
        numbers = rng.sample([*range(NUM_BLOCKS), *PLAIN], 6)
        slots = [empty_slot() for _ in numbers]
        outcomes = store.get([block_key(number) for number in numbers], slots)
        assert Outcome.DAMAGED not in outcomes
        for number, slot, outcome in zip(numbers, slots, outcomes, strict=True):
            assert not outcome.is_hit or same_block(slot, make_slot(number)), f"block {number} holds other bytes"
            num_hits += outcome.is_hit
    return num_hits


def test_threads_share_a_store_and_never_see_wrong_bytes(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=6, disk_nbytes=BUDGET_NBYTES) as store, ThreadPoolExecutor(5) as threads:
        store.create_stream(HEADER)
        jobs = [threads.submit(_produce, store), *(threads.submit(_cache, store, seed) for seed in (1, 2))]
        readers = [threads.submit(_read, store, seed) for seed in (3, 4)]
        for job in jobs:
            job.result(60)
        assert all(reader.result(60) > 0 for reader in readers)
        store.flush()
        assert len(store.manifest("lecture").entries) == NUM_BLOCKS
        assert store.verify().is_clean


def test_hits_of_a_store_that_is_being_closed_are_right_or_refused(tmp_path: Path) -> None:
    numbers = range(4)
    with open_store(tmp_path) as store:
        store.put([block_key(number) for number in numbers], [make_slot(number) for number in numbers], [40] * 4)

    def read_on(store: Store) -> int:
        num_read = 0
        while True:
            slots = [empty_slot() for _ in numbers]
            try:
                outcomes = store.get([block_key(number) for number in numbers], slots)
            except BusyError:
                return num_read
            for number, slot, outcome in zip(numbers, slots, outcomes, strict=True):
                assert outcome.is_hit
                assert same_block(slot, make_slot(number))
            num_read += 1

    with ThreadPoolExecutor(3) as threads:
        for _ in range(20):
            store = open_store(tmp_path, Access.READ, host_slots=2)
            jobs = [threads.submit(read_on, store) for _ in range(3)]
            time.sleep(0.01)
            store.close()
            assert all(job.result(HANG_S) >= 0 for job in jobs)
