# SPDX-License-Identifier: Apache-2.0
"""Blocks written by the batch: packed, placed and committed as one by one, with fewer transfers and commits."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codec import Codec, Profile
from kvstore.errors import ShapeError
from kvstore.native import crc32c, pack_extents, seal_extent
from kvstore.store import Outcome, Store
from kvstore.tiers.base import Extent
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.placing.free_space import FreeSpace
from kvstore.tiers.tables.blocks import oldest_first
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, ExtentHeader, extent_nbytes, unpack_extent_header
from kvstore.tiers.writing.packing import NewRecord, pack
from kvstore.tiers.writing.record_writer import transfers
from tests.codec_slots import make_layout, normal_slot
from tests.store_blocks import EXTENT_NBYTES, LAYOUT, block_key, empty_slot, make_slot, open_store, same_block


@pytest.mark.parametrize("profile", list(Profile))
def test_packed_blocks_are_what_each_alone_is_encoded_to(profile: Profile) -> None:
    layout = make_layout()
    codec = Codec(layout, profile)
    tokens = [1, layout.block_tokens - 1, layout.block_tokens]
    blocks = [
        NewRecord(block_key(number), normal_slot(layout, number), count, 128 * number)
        for number, count in enumerate(tokens)
    ]
    room = extent_nbytes(codec.bound(layout.block_tokens))
    out = memoryview(bytearray(b"x" * (len(blocks) * room)))
    at = 0
    for number, (block, packed) in enumerate(zip(blocks, pack(codec, profile, blocks, [7, 8, 9], out), strict=True)):
        alone = bytearray(codec.bound(block.num_tokens))
        nbytes = codec.encode(block.slot, block.num_tokens, block.first_token, alone)
        record = out[at + EXTENT_HEADER_NBYTES : at + EXTENT_HEADER_NBYTES + packed.nbytes]
        assert record == alone[:nbytes]
        assert packed.directory == record[: Codec.probe(record).header_nbytes]
        header = unpack_extent_header(out[at:])
        assert header == ExtentHeader(block.key, 7 + number, nbytes, crc32c(record))
        end = at + extent_nbytes(nbytes)
        assert not any(out[at + EXTENT_HEADER_NBYTES + nbytes : end])
        at = end
    assert set(out[at:]) <= {ord("x")}


def test_what_does_not_fit_is_refused() -> None:
    slot, geometry = make_slot(1), Codec(LAYOUT, Profile.RAW).writer(1)[0]
    rest = (1, 0, (0, 0, False, False), None)
    for key, room in ((b"k" * 31, 1 << 16), (b"k" * 32, 63), (b"k" * 32, 64), (b"k" * 32, 8192)):
        with pytest.raises(ShapeError):
            pack_extents(geometry, *rest, [(slot.numpy().data, 40, 0, key, 1)], bytearray(room))
    with pytest.raises(ShapeError):
        pack_extents(geometry, *rest, [(slot[1:].numpy().data, 40, 0, b"k" * 32, 1)], bytearray(1 << 16))
    for nbytes in (4096 - 63, 1 << 63, (1 << 64) - 64):
        with pytest.raises(ShapeError):
            seal_extent(b"k" * 32, 1, nbytes, bytearray(4096))


@given(
    holes=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
)
def test_a_run_is_placed_as_first_fit_places_one_by_one(holes: list[int], sizes: list[int]) -> None:
    ends = [sum(holes[: count + 1]) + count for count in range(len(holes))]
    spaces = [FreeSpace.around([(end, 1) for end in ends], ends[-1] + 1) for _ in range(2)]
    alone = [spaces[0].allocate(size) for size in sizes]
    together: list[int | None] = []
    while len(together) < len(sizes):
        rest = sizes[len(together) :]
        found = spaces[1].allocate_run(rest)
        if found is None:
            together.append(None)
            continue
        offset, count = found
        together += [offset + sum(rest[:number]) for number in range(count)]
    assert together == alone
    assert spaces[1].ranges() == spaces[0].ranges()
    assert spaces[1].free_nbytes == spaces[0].free_nbytes


def test_neighbours_in_memory_and_file_are_one_transfer() -> None:
    extents = [
        Extent(0, 0, 4096),
        Extent(0, 4096, 8192),
        Extent(0, 65536, 4096),
        Extent(1, 0, 4096),
        Extent(1, 4096, 4096),
    ]
    assert transfers(extents, 8192) == {
        0: [(0, 8192, 12288), (65536, 20480, 4096)],
        1: [(0, 24576, 8192)],
    }
    apart = [Extent(0, 0, 4096), Extent(1, 0, 4096), Extent(0, 4096, 4096)]
    assert transfers(apart, 0)[0] == [(0, 0, 4096), (4096, 8192, 4096)], "another file's lies between them in memory"


def test_puts_that_wait_together_share_a_commit(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([block_key(0)], [make_slot(0)], [40])
        before = _num_commits(store)
        outcomes = _put_together(store, [[1, 2], [2, 3], [0], [4]])
        assert outcomes == [[Outcome.STORED] * 2, [Outcome.STORED] * 2, [Outcome.STORED], [Outcome.STORED]]
        assert _num_commits(store) == before + 2, "one for the put that was before them"
        assert _stored(store, range(5)) == set(range(5))
        assert store.verify().is_clean


def test_puts_that_do_not_fit_together_end_as_if_alone(tmp_path: Path) -> None:
    with open_store(tmp_path, disk_nbytes=(1 << 19) + 4 * EXTENT_NBYTES) as store:
        most = 0  # blocks that the budget holds
        while store.exists([block_key(number) for number in range(most)]) == [True] * most:
            assert store.put([block_key(most)], [make_slot(most)], [40]) == [Outcome.STORED]
            most += 1
        most -= 1
        first, second = list(range(100, 100 + most)), list(range(200, 200 + most))
        outcomes = _put_together(store, [first, second, list(range(300, 301 + 2 * most))])
        assert outcomes[:2] == [[Outcome.STORED] * most] * 2, "the second put evicts the first"
        assert outcomes[2][:most] == [Outcome.STORED] * most
        assert outcomes[2][-1] is Outcome.FULL
        assert store.verify().is_clean


def test_a_part_that_is_queued_though_no_thread_could_be_had_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = range(200)
    blocks = [block_key(number) for number in numbers], [make_slot(number) for number in numbers], [40] * len(numbers)
    with open_store(tmp_path) as store:
        assert store._data is not None
        assert store._data.write is not None
        encoders = store._data.write.records._encoders
        submit, queued = encoders.submit, []

        def queue_and_refuse(*args: Any) -> Future[Any]:
            queued.append(args)
            if len(queued) == 3:
                raise RuntimeError("can't start new thread")
            return submit(*args)

        with monkeypatch.context() as patched:
            patched.setattr(encoders, "submit", queue_and_refuse)
            assert store.put(*blocks) == [Outcome.UNAVAILABLE] * len(numbers)
        with pytest.raises(RuntimeError, match="thread"):
            store.flush()
        used_nbytes = store._disk.allocator.used_nbytes
        submit(*queued[2]).exception()  # the executor has it in its queue still
        assert store._disk.allocator.used_nbytes == used_nbytes
        assert store.put(*blocks) == [Outcome.STORED] * len(numbers)
        assert store.verify().is_clean


def test_a_put_is_a_use_and_later_uses_come_behind_it(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=2) as store:
        numbers = list(range(6))
        store.put([block_key(number) for number in numbers], [make_slot(number) for number in numbers], [40] * 6)
        store.get([block_key(1)], [empty_slot()])
        store.put([block_key(6)], [make_slot(6)], [40])
        store.get([block_key(3)], [empty_slot()])
        store.put([block_key(0)], [make_slot(0)], [40])
        store.put([block_key(7)], [make_slot(7)], [40])
        with store._disk.catalogue.read() as view:
            order = [candidate.key for candidate in oldest_first(view, {})]
        assert order == [block_key(number) for number in (2, 4, 5, 1, 6, 3, 0, 7)]


def test_many_items_of_a_ticket_are_claimed_and_ended_at_once() -> None:
    ticket = BatchTicket(4)
    ticket.settle(1, Outcome.STORED)
    assert ticket.claim(3)
    assert ticket.claim_open([3, 2, 1, 0]) == [1, 3], "by their place; what has ended or is claimed is not"
    assert ticket.claim_open([0, 2]) == []
    ticket.cancel()
    ticket.unclaim_all([2, 0], [Outcome.STORED, Outcome.FULL])
    ticket.unclaim(3, None)
    assert ticket.outcomes() == [Outcome.FULL, Outcome.STORED, Outcome.STORED, Outcome.CANCELLED]
    ticket.settle_all([0, 3], [Outcome.STORED] * 2)
    assert ticket.outcomes()[0] is Outcome.FULL, "what has ended stays so"


def _put_together(store: Store, batches: list[list[int]]) -> list[list[Outcome]]:
    """Submit several puts that the writer finds in its queue at once; it is busy with another one until then."""
    with store._disk.mutation:
        busy = store.submit_put([block_key(999)], [make_slot(999)], [40])
        tickets = []
        assert store._data is not None
        assert store._data.write is not None
        while store._data.write.writer._queue.waiting:
            pass  # until it has taken that one
        for numbers in batches:
            slots = [make_slot(number) for number in numbers]
            tickets.append(store.submit_put([block_key(number) for number in numbers], slots, [40] * len(numbers)))
    assert busy.outcomes() == [Outcome.STORED]
    return [ticket.outcomes() for ticket in tickets]


def _num_commits(store: Store) -> int:
    return int(store._disk.catalogue._env.info()["last_txnid"])


def _stored(store: Store, numbers: range) -> set[int]:
    slots = {number: empty_slot() for number in numbers}
    store.get([block_key(number) for number in numbers], list(slots.values()))
    return {number for number, slot in slots.items() if same_block(slot, make_slot(number))}
