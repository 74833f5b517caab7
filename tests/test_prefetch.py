# SPDX-License-Identifier: Apache-2.0
"""Prefetch into the host tier, blocks that are kept there, quotas of streams, and loads layer by layer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.errors import ConfigError, ShapeError
from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey
from kvstore.store import Access, Durability, Outcome, Store
from kvstore.tiers.reading.fetcher import Fetcher
from tests.store_blocks import (
    HEADER,
    LAYOUT,
    SPEC,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    same_block,
)


def _keys(*numbers: int) -> list[BlockKey]:
    return [block_key(number) for number in numbers]


def _put(store: Store, count: int) -> None:
    store.put(_keys(*range(count)), [make_slot(number) for number in range(count)], [40] * count)


def _get(store: Store, *numbers: int) -> list[Outcome]:
    slots = [empty_slot() for _ in numbers]
    outcomes = store.get(_keys(*numbers), slots)
    for number, slot, outcome in zip(numbers, slots, outcomes, strict=True):
        assert not outcome.is_hit or same_block(slot, make_slot(number))
    return outcomes


def test_prefetched_blocks_are_served_from_memory_and_counted(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=4) as store:
        _put(store, 8)
        assert store.prefetch(_keys(0, 1, 99)).wait(60) == [Outcome.DISK, Outcome.DISK, Outcome.MISS]
        assert store.prefetch(_keys(1)).wait(60) == [Outcome.HOST]
        assert _get(store, 0, 0, 5) == [Outcome.HOST, Outcome.HOST, Outcome.DISK]
        host = store.stats().host
        assert (host.prefetched_blocks, host.prefetch_hits, host.prefetch_wasted) == (2, 1, 0)
        _get(store, 2, 3, 4, 6)
        assert store.stats().host.prefetch_wasted == 1
        assert (store.stats().host.hits, store.stats().disk.hits) == (2, 5)


def test_what_does_not_fit_the_host_tier_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=4) as store:
        _put(store, 12)
        leases = [store._moving().host.try_reserve(block_key(100 + number)) for number in range(3)]
        outcomes = store.prefetch(_keys(*range(12))).wait(60)
        assert outcomes is not None
        # One slot is left, and takes one block after the other; more than four cannot wait.
        assert outcomes[4:] == [Outcome.FULL] * 8
        assert outcomes[0] is Outcome.DISK
        for lease in leases:
            assert lease is not None
            lease.release()


def test_the_most_wanted_comes_first_and_cancelled_ones_do_not_come(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=8) as store:
        _put(store, 8)
        prefetcher = store._moving().prefetcher
        prefetcher._unit_blocks = 1
        with store._moving().fetcher._lock:  # no unit begins
            late, cancelled, early = (store.prefetch(_keys(n), priority) for n, priority in ((0, 1), (1, 9), (2, 5)))
            cancelled.cancel()
        assert late.wait(60) == [Outcome.DISK]
        assert early.done()
        assert cancelled.wait(60) == [Outcome.CANCELLED]
        assert store.exists(_keys(0, 1, 2)) == [True] * 3
        assert [store._moving().host.contains(key) for key in _keys(0, 1, 2)] == [True, False, True]


def end_demand(fetcher: Fetcher) -> None:
    with fetcher._lock:
        fetcher._demands.clear()
        fetcher._changed.notify_all()


def test_prefetch_waits_for_demand(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=8) as store:
        _put(store, 8)
        fetcher = store._moving().fetcher
        fetcher._demands.add("demand")  # somebody is being served
        ticket = store.prefetch(_keys(0))
        assert ticket.wait(0.1) is None
        assert _get(store, 1) == [Outcome.DISK]
        assert not ticket.done()
        end_demand(fetcher)
        assert ticket.wait(60) == [Outcome.DISK]
        with fetcher._lock:
            fetcher._demands.add("demand")
        waiting = store.prefetch(_keys(2, 3))
        threading.Timer(0.2, end_demand, (fetcher,)).start()  # closing waits for what is being served
    assert waiting.wait(0) == [Outcome.CANCELLED] * 2, "closing does not wait for what has not begun"


def test_a_second_use_lets_a_block_in(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _put(store, 3)
    nbytes = 4 * LAYOUT.slot_nbytes
    with Store.open(tmp_path, access=Access.READ, layout=LAYOUT, host_nbytes=nbytes, admission="second-use") as store:
        assert [_get(store, 0)[0] for _ in range(3)] == [Outcome.DISK, Outcome.DISK, Outcome.HOST]


@pytest.mark.parametrize("name", ["eviction", "admission"])
def test_an_unknown_policy_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="s3-fifo"):
        Store.open(tmp_path, access=Access.WRITE, layout=LAYOUT, **{name: "best"})  # type: ignore[arg-type]


@pytest.mark.parametrize("eviction", ["lru", "s3-fifo", "lfu", "participation"])
def test_every_policy_serves_right_bytes(tmp_path: Path, eviction: str) -> None:
    host_nbytes = 4 * LAYOUT.slot_nbytes
    with Store.open(tmp_path, access=Access.WRITE, layout=LAYOUT, host_nbytes=host_nbytes, eviction=eviction) as store:
        _put(store, 12)
        for turn in range(60):
            assert _get(store, turn % 5, 11 - turn % 7, turn * turn % 12) != [Outcome.MISS] * 3
            store.note_attention({block_key(turn % 12): 0.5})
        assert store.stats().host.hits > 0


def test_kept_blocks_stay_and_never_take_more_than_half(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=4) as store:
        _put(store, 12)
        store.keep(_keys(0, 1, 2))
        _get(store, 0, 1, 2, *range(3, 12))
        assert _get(store, 0, 1) == [Outcome.HOST] * 2
        assert _get(store, 2) == [Outcome.DISK], "a third would be more than half of four"
        store.unkeep(_keys(0, 1))
        _get(store, *range(3, 9))
        assert _get(store, 0) == [Outcome.DISK]


def test_a_stream_cannot_push_another_out_beyond_its_quota(tmp_path: Path) -> None:
    nbytes = LAYOUT.slot_nbytes
    with Store.open(
        tmp_path, access=Access.WRITE, layout=LAYOUT, host_nbytes=6 * nbytes, stream_nbytes=3 * nbytes
    ) as store:
        for name, first, count in (("lecture", 0, 3), ("other", 100, 9)):
            store.create_stream(replace(HEADER, name=name))
            blocks = [
                replace(block, entry=replace(block.entry, index=index))
                for index, block in enumerate(make_blocks(count, first))
            ]
            for block in blocks:
                store.append(name, [block], {})
        store.flush()
        assert _get(store, 0, 1, 2) == [Outcome.HOST] * 3
    with pytest.raises(ConfigError, match="stream_nbytes"):
        Store.open(tmp_path, access=Access.WRITE, layout=LAYOUT, stream_nbytes=nbytes)


@pytest.mark.parametrize("group_layers", [1, 2, 3, 5, None])
@pytest.mark.parametrize("in_memory", [False, True])
def test_layers_come_in_order_and_make_whole_blocks(tmp_path: Path, group_layers: int | None, in_memory: bool) -> None:
    with open_store(tmp_path, host_slots=4) as store:
        _put(store, 4)
        if in_memory:
            _get(store, 0, 1, 2, 3)
        slots = [empty_slot() for _ in range(5)]
        came: list[range] = []
        all_came = threading.Event()

        def on_layers(layers: range, outcomes: Sequence[Outcome]) -> None:
            assert [outcome.is_hit for outcome in outcomes] == [True] * 4 + [False]
            came.append(layers)
            if layers.stop == LAYOUT.spec.num_layers:
                all_came.set()

        load = store.load_layers(_keys(0, 1, 2, 3, 99), slots, group_layers=group_layers, on_layers=on_layers)
        for layer in range(LAYOUT.spec.num_layers):
            outcomes = load.wait(layer, 60)
            assert outcomes is not None
            assert outcomes[4] is Outcome.MISS
            for number in range(4):
                for part in (LAYOUT.keys, LAYOUT.values):
                    left, right = part(slots[number])[layer], part(make_slot(number))[layer]
                    assert torch.equal(left.view(torch.int16), right.view(torch.int16))
        assert load.done()
        assert all_came.wait(60)
        assert [layer for layers in came for layer in layers] == list(range(LAYOUT.spec.num_layers))
        assert all(same_block(slots[number], make_slot(number)) for number in range(4))


def test_nothing_is_written_to_slots_of_a_cancelled_load_after_a_wait(tmp_path: Path) -> None:
    layout = BlockLayout(replace(SPEC, num_layers=8, kv_heads=8, key_dim=128, value_dim=128), 256)
    keys = _keys(0, 1, 2, 3)
    slots = [torch.zeros(layout.slot_nbytes, dtype=torch.uint8) for _ in keys]
    num_cancelled = 0
    with Store.open(
        tmp_path,
        access=Access.WRITE,
        layout=layout,
        host_nbytes=2 * layout.slot_nbytes,
        durability=Durability.NONE,
    ) as store:
        store.put(keys, slots, [256] * 4)
        for trial in range(40):
            load = store.load_layers(keys, slots, group_layers=1)
            time.sleep(0.0005 * trial)
            load.cancel()
            last = load.wait(layout.spec.num_layers - 1, 60)
            for slot in slots:
                slot.fill_(7)
            outcomes = [load.wait(layer, 60) for layer in range(layout.spec.num_layers)]
            assert outcomes[-1] == last
            assert load.done()
            assert all((slot == 7).all() for slot in slots)
            num_cancelled += any(Outcome.CANCELLED in (each or ()) for each in outcomes)
    assert num_cancelled > 0


def test_a_misuse_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with pytest.raises(ConfigError, match="group_layers"):
            store.load_layers([], [], group_layers=0)
        with pytest.raises(ShapeError):
            store.prefetch([BlockKey(b"short")])
        with pytest.raises(ShapeError, match="layer 3"):
            store.load_layers([], []).wait(LAYOUT.spec.num_layers)


def test_plain_blocks_are_written_when_they_are_used_a_second_time(tmp_path: Path) -> None:
    def opened() -> Store:
        nbytes = 4 * LAYOUT.slot_nbytes
        return Store.open(tmp_path, access=Access.WRITE, layout=LAYOUT, host_nbytes=nbytes, put_admission="second-use")

    with opened() as store:
        _put(store, 4)
        assert store.stats().num_blocks == 0
        assert store.exists(_keys(0, 1, 2, 3)) == [True] * 4
        assert _get(store, 0) == [Outcome.HOST]
        assert store.put(_keys(1), [make_slot(1)], [40]) == [Outcome.STORED]
        assert store.remove(_keys(2, 9)) == [True, False]
        store.flush()
        assert store.stats().num_blocks == 2
        assert store.put(_keys(5), [make_slot(5)], [40], timeout_s=60) == [Outcome.STORED]
    with opened() as store:
        assert _get(store, 0, 1, 2, 3, 5) == [Outcome.DISK, Outcome.DISK, *[Outcome.MISS] * 3]
        assert store.verify().is_clean


def test_a_block_that_finds_no_room_in_memory_is_written_at_once(tmp_path: Path) -> None:
    with Store.open(
        tmp_path,
        access=Access.WRITE,
        layout=LAYOUT,
        host_nbytes=2 * LAYOUT.slot_nbytes,
        put_admission="second-use",
    ) as store:
        leases = [store._moving().host.try_reserve(block_key(100 + number)) for number in range(2)]
        _put(store, 3)
        assert store.stats().num_blocks == 3
        for lease in leases:
            assert lease is not None
            lease.release()
