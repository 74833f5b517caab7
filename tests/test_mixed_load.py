# SPDX-License-Identifier: Apache-2.0
"""All at once: reads and writes with deadlines, cancelled tickets, prefetch, loads by layers, under many policies."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvstore.store import Access, Durability, Outcome, Store
from tests.store_blocks import EXTENT_NBYTES, LAYOUT, block_key, empty_slot, make_slot, same_block

NUMBERS = range(48)
BUDGET_NBYTES = (1 << 19) + 30 * EXTENT_NBYTES
ENDINGS = {Outcome.TIMED_OUT, Outcome.CANCELLED, Outcome.MISS}
HANG_S = 120.0


def _check(number: int, slot: torch.Tensor, outcome: Outcome) -> None:
    if outcome.is_hit:
        assert same_block(slot, make_slot(number)), f"block {number} holds other bytes"
    else:
        assert outcome in ENDINGS, outcome


def _read(store: Store, rng: random.Random) -> None:
    numbers = rng.choices(NUMBERS, k=rng.randint(1, 8))
    keys, slots = [block_key(number) for number in numbers], [empty_slot() for _ in numbers]
    outcomes: list[Outcome] | None
    if rng.random() < 0.5:
        outcomes = store.get(keys, slots, timeout_s=rng.choice([None, 0.0, 0.001, 0.01, 60.0]))
    else:
        ticket = store.submit_get(keys, slots, timeout_s=rng.choice([None, 0.002]))
        if rng.random() < 0.5:
            ticket.wait(rng.random() * 0.003)
            ticket.cancel()
        outcomes = ticket.wait(HANG_S)
    assert outcomes is not None, "a ticket hangs"
    ended = [slot.clone() for slot in slots]
    for number, slot, outcome in zip(numbers, slots, outcomes, strict=True):
        _check(number, slot, outcome)
    store.exists(keys)  # time for a late read to do damage
    assert all(torch.equal(*pair) for pair in zip(slots, ended, strict=True)), "a slot was written after its outcome"


def _write(store: Store, rng: random.Random) -> None:
    numbers = rng.choices(NUMBERS, k=rng.randint(1, 6))
    slots = [make_slot(number) for number in numbers]
    keys = [block_key(number) for number in numbers]
    ticket = store.submit_put(keys, slots, [40] * len(keys), timeout_s=rng.choice([None, 0.0, 0.003, 60.0]))
    if rng.random() < 0.3:
        ticket.cancel()
    outcomes = ticket.wait(HANG_S)
    assert outcomes is not None, "a ticket hangs"
    for slot in slots:
        slot.zero_()  # what is stored under these keys must not change with it
    assert set(outcomes) <= {Outcome.STORED, Outcome.TIMED_OUT, Outcome.CANCELLED}


def _by_layers(store: Store, rng: random.Random) -> None:
    number, slot = rng.choice(NUMBERS), empty_slot()
    load = store.load_layers([block_key(number)], [slot], group_layers=rng.randint(1, 3))
    if rng.random() < 0.3:
        load.cancel()
    ends = [load.wait(layer, HANG_S) for layer in range(LAYOUT.spec.num_layers)]
    assert all(end is not None for end in ends), "a load hangs"
    if all(end is not None and end[0].is_hit for end in ends):
        assert same_block(slot, make_slot(number))


def _work(store: Store, seed: int, turns: int) -> None:
    rng = random.Random(seed)
    for _ in range(turns):
        match rng.randrange(8):
            case 0 | 1 | 2:
                _read(store, rng)
            case 3 | 4:
                _write(store, rng)
            case 5:
                _by_layers(store, rng)
            case 6:
                ticket = store.prefetch([block_key(n) for n in rng.sample(NUMBERS, 4)], rng.randrange(3))
                if rng.random() < 0.5:
                    ticket.cancel()
            case _:
                store.remove([block_key(rng.choice(NUMBERS))])
                store.note_attention({block_key(rng.choice(NUMBERS)): rng.random()})


@pytest.mark.parametrize(
    ("eviction", "put_admission", "turns"),
    [
        ("lru", "always", 400),
        ("s3-fifo", "second-use", 400),
        ("participation", "always", 400),
        pytest.param("lfu", "second-use", 5000, marks=pytest.mark.slow),
    ],
)
def test_nothing_hangs_and_no_byte_is_wrong(tmp_path: Path, eviction: str, put_admission: str, turns: int) -> None:
    with (
        Store.open(
            tmp_path,
            access=Access.WRITE,
            layout=LAYOUT,
            host_nbytes=7 * LAYOUT.slot_nbytes,
            disk_nbytes=BUDGET_NBYTES,
            durability=Durability.NONE,
            eviction=eviction,
            put_admission=put_admission,
        ) as store,
        ThreadPoolExecutor(6) as threads,
    ):
        jobs = [threads.submit(_work, store, seed, turns) for seed in range(6)]
        for job in jobs:
            job.result(5 * HANG_S)
        host = store._moving().host
        store.flush()
        assert store.verify().is_clean
    assert not any(host._pins), "a lease was never given back"
