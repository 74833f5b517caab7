# SPDX-License-Identifier: Apache-2.0
"""Streams: what is appended comes back bit for bit, in this process, after reopening, and layer by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.errors import (
    BusyError,
    ConfigError,
    KVStoreError,
    ReadOnlyError,
    ShapeError,
    SpecMismatchError,
    StoreNotFoundError,
    StreamNotFoundError,
)
from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey, chain_key
from kvstore.store import (
    Access,
    Durability,
    FetchRequest,
    NewBlock,
    Outcome,
    Profile,
    Store,
    Tier,
    check_spec,
)
from tests.store_blocks import HEADER, LAYOUT, SPEC, make_blocks, make_slot, open_store, requests_for, same_block


def test_a_stream_survives_reopening_bit_for_bit(tmp_path: Path) -> None:
    blocks = make_blocks(10)
    with open_store(tmp_path) as store:
        assert store.create_stream(HEADER).entries == ()
        store.append("lecture", blocks, {"next_frame": 10, "is_complete": True})
        store.flush()
    with open_store(tmp_path, Access.READ) as store:
        manifest = store.manifest("lecture")
        assert list(manifest.entries) == [block.entry for block in blocks]
        assert (manifest.header, manifest.cursor["next_frame"], manifest.num_tokens) == (HEADER, 10, 400)
        assert manifest.is_complete
        assert store.summaries("lecture", 8, 5) == {8: b"summary 8", 9: b"summary 9"}
        requests = requests_for(blocks)
        report = store.fetch(requests)
        assert report.outcomes == [Outcome.DISK] * 10
        assert all(same_block(request.slot, block.slot) for request, block in zip(requests, blocks, strict=True))
        assert store.verify().is_clean


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 33, 70])
def test_one_append_may_be_larger_than_the_host_tier(tmp_path: Path, count: int) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(count), {"next": count})
        store.flush()
        manifest = store.manifest("lecture")
        assert (len(manifest.entries), manifest.cursor) == (count, {"next": count})
        assert store.verify().is_clean


def test_a_large_append_does_not_deadlock_on_a_tiny_host_tier(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=2) as store:
        store.create_stream(HEADER)
        for first in (0, 20):
            store.append("lecture", make_blocks(20, first), {})
        store.flush()
        assert len(store.manifest("lecture").entries) == 40


def test_appended_blocks_are_found_before_they_are_on_disk(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(2), {})
        requests = requests_for(make_blocks(2))
        assert store.fetch(requests).outcomes == [Outcome.HOST] * 2
        assert same_block(requests[1].slot, make_slot(1))


@pytest.mark.parametrize("num_tokens", [1, 39, 40])
def test_short_blocks_keep_their_tokens(tmp_path: Path, num_tokens: int) -> None:
    blocks = make_blocks(2, num_tokens=num_tokens)
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", blocks, {})
    with open_store(tmp_path, Access.READ) as store:
        requests = requests_for(blocks)
        store.fetch(requests)
        assert all(same_block(r.slot, b.slot, num_tokens) for r, b in zip(requests, blocks, strict=True))


@pytest.mark.parametrize("layers", [range(1), range(1, 2), range(1, 3), range(2, 3), range(3)])
@pytest.mark.parametrize("is_in_host", [False, True])
def test_a_range_of_layers_is_read_alone(tmp_path: Path, layers: range, is_in_host: bool) -> None:
    blocks = make_blocks(3)
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", blocks, {})
    with open_store(tmp_path, Access.READ) as store:
        if is_in_host:
            store.fetch(requests_for(blocks))
        requests = requests_for(blocks, layers)
        assert store.fetch(requests).outcomes == [Outcome.HOST if is_in_host else Outcome.DISK] * 3
    for request, block in zip(requests, blocks, strict=True):
        for part in (LAYOUT.keys, LAYOUT.values):
            got, wanted = part(request.slot).view(torch.int16), part(block.slot).view(torch.int16)
            assert torch.equal(got[layers.start : layers.stop], wanted[layers.start : layers.stop])
            assert not got[: layers.start].any()
            assert not got[layers.stop :].any()


def test_reading_one_layer_moves_fewer_bytes_than_the_block(tmp_path: Path) -> None:
    layout = BlockLayout(replace(SPEC, num_layers=16), block_tokens=40)
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    with Store.open(
        tmp_path, access=Access.WRITE, layout=layout, profile=Profile.RAW, host_nbytes=4 * layout.slot_nbytes
    ) as store:
        key = chain_key(None, b"", "layers")
        assert store.put([key], [slot], [40]) == [Outcome.STORED]
        report = store.fetch([FetchRequest(key, slot, range(7, 8))])
        assert report.outcomes == [Outcome.DISK]
        assert 0 < report.bytes_read[Tier.DISK] <= layout.slot_nbytes // 4


def test_blocks_read_whole_are_served_from_memory_the_next_time(tmp_path: Path) -> None:
    blocks = make_blocks(3)
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", blocks, {})
    with open_store(tmp_path, Access.READ) as store:
        first, second = store.fetch(requests_for(blocks)), store.fetch(requests_for(blocks))
        assert (first.outcomes, second.outcomes) == ([Outcome.DISK] * 3, [Outcome.HOST] * 3)
        assert second.bytes_read[Tier.DISK] == 0
        stats = store.stats()
        assert (stats.host.hits, stats.host.misses, stats.disk.hits) == (3, 3, 3)


def test_neighbours_on_disk_are_read_in_one_go(tmp_path: Path) -> None:
    blocks = make_blocks(4)
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", blocks, {})
    with open_store(tmp_path, Access.READ) as store:
        used = store.stats().usage.extent_used_nbytes
        order = [2, 0, 3, 1]
        report = store.fetch(requests_for([blocks[position] for position in order]))
        assert report.outcomes == [Outcome.DISK] * 4
        assert report.bytes_read[Tier.DISK] == used


def test_the_same_block_twice_in_a_batch_fills_both_slots(tmp_path: Path) -> None:
    blocks = make_blocks(1)
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", blocks, {})
    with open_store(tmp_path, Access.READ) as store:
        requests = requests_for(blocks * 2)
        assert store.fetch(requests).outcomes == [Outcome.DISK] * 2
        assert all(same_block(request.slot, blocks[0].slot) for request in requests)


def test_unknown_blocks_are_misses_and_an_empty_batch_is_fine(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.fetch(requests_for(make_blocks(2))).outcomes == [Outcome.MISS] * 2
        assert store.fetch([]).outcomes == []


def test_a_repeated_block_is_stored_once(tmp_path: Path) -> None:
    blocks = make_blocks(3)
    blocks.append(NewBlock(replace(blocks[0].entry, index=3), blocks[0].slot, b"again"))
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.create_stream(replace(HEADER, name="other"))
        store.append("lecture", blocks, {})
        store.append("other", make_blocks(2), {})
        store.flush()
        assert store.stats().num_blocks == 3
        assert store.remove_stream("lecture") == store.stats().usage.extent_used_nbytes // 2
        assert (store.stats().num_blocks, store.exists([blocks[2].entry.key])) == (2, [False])
        assert store.verify().is_clean
        assert store.remove_stream("other") > 0
        assert store.stats().usage.extent_used_nbytes == 0


def test_a_resumed_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    for first in (0, 3):
        with open_store(tmp_path) as store:
            manifest = store.create_stream(replace(HEADER, created_unix_s=float(first)))
            assert (len(manifest.entries), manifest.cursor) == (first, {"next": first} if first else {})
            store.append("lecture", make_blocks(3, first), {"next": first + 3})
    with open_store(tmp_path, Access.READ) as store:
        assert store.manifest("lecture").cursor == {"next": 6}
        assert [header.name for header in store.streams()] == ["lecture"]


def _with(block: NewBlock, **changes: object) -> list[NewBlock]:
    return [replace(block, **changes)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        (make_blocks(1, first=1), ConfigError),
        (_with(make_blocks(1)[0], slot=torch.zeros(8, dtype=torch.uint8)), ShapeError),
        (_with(make_blocks(1)[0], slot=torch.zeros(LAYOUT.slot_nbytes, dtype=torch.int8)), ShapeError),
        (make_blocks(1, num_tokens=0), ShapeError),
        (make_blocks(1, num_tokens=41), ShapeError),
        (_with(make_blocks(1)[0], entry=replace(make_blocks(1)[0].entry, key=BlockKey(b"short"))), ShapeError),
        (_with(make_blocks(1)[0], entry=replace(make_blocks(1)[0].entry, first_token=-1)), ShapeError),
        (_with(make_blocks(1)[0], entry=replace(make_blocks(1)[0].entry, end_s=float("nan"))), ShapeError),
    ],
)
def test_a_misuse_of_append_is_refused_and_changes_nothing(
    tmp_path: Path, blocks: list[NewBlock], error: type[KVStoreError]
) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        with pytest.raises(error):
            store.append("lecture", blocks, {})
        store.append("lecture", make_blocks(1), {})
        store.flush()
        assert len(store.manifest("lecture").entries) == 1


@pytest.mark.parametrize("layers", [range(0), range(4), range(-1, 1), range(0, 3, 2)])
def test_layers_that_do_not_exist_are_refused(tmp_path: Path, layers: range) -> None:
    with open_store(tmp_path) as store, pytest.raises(ShapeError):
        store.fetch(requests_for(make_blocks(1), layers))


def test_other_models_and_other_settings_are_refused(tmp_path: Path) -> None:
    other = replace(SPEC, revision="1")
    with open_store(tmp_path) as store:
        with pytest.raises(SpecMismatchError, match="revision"):
            store.create_stream(replace(HEADER, spec=other))
        with pytest.raises(SpecMismatchError, match="41 tokens"):
            store.create_stream(replace(HEADER, block_tokens=41))
        with pytest.raises(ConfigError, match="q8"):
            store.create_stream(replace(HEADER, profile=Profile.Q8))
        with pytest.raises(StreamNotFoundError, match="lecture"):
            store.append("lecture", [], {})
    with pytest.raises(SpecMismatchError):
        check_spec(HEADER, other)


def test_a_reader_cannot_change_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        open_store(tmp_path / "nothing", Access.READ)
    open_store(tmp_path).close()
    with open_store(tmp_path, Access.READ) as store:
        for call in (store.flush, lambda: store.remove_stream("a"), lambda: store.create_stream(HEADER)):
            with pytest.raises(ReadOnlyError):
                call()


def test_a_store_without_a_layout_lists_verifies_and_removes(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(3), {})
    with Store.open(tmp_path, access=Access.WRITE) as store:
        assert store.verify("lecture").num_blocks == 3
        with pytest.raises(ConfigError, match="layout"):
            store.fetch([])
        assert store.remove_stream("lecture") > 0
        assert store.verify().is_clean


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    store.close()
    with pytest.raises(BusyError, match="closed"):
        store.streams()
    open_store(tmp_path).close()


def test_a_host_budget_below_two_slots_is_refused_and_leaves_the_store_free(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two"):
        open_store(tmp_path, host_slots=1)
    open_store(tmp_path).close()


def test_with_durability_sync_an_append_is_durable_on_return(tmp_path: Path) -> None:
    with open_store(tmp_path, durability=Durability.SYNC) as store:
        store.create_stream(HEADER)
        for index in range(3):
            store.append("lecture", make_blocks(1, index), {"next": index + 1})
            assert store.manifest("lecture").cursor == {"next": index + 1}
