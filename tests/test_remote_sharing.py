# SPDX-License-Identifier: Apache-2.0
"""Streams that travel through a server: whole, as they grow, broken off, damaged on the way, gone their own ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.errors import CapacityError, ConfigError, CorruptRecordError, StoreIOError, StreamNotFoundError
from kvstore.remote.address import open_server
from kvstore.remote.envelope import ENVELOPE_NBYTES, Kind, Namespace, seal
from kvstore.remote.sharing.pull import pull
from kvstore.remote.sharing.push import push
from kvstore.store import Access, Profile, Store
from tests.remote_servers import RedisServer, mooncake_servers, redis_server
from tests.store_blocks import (
    HEADER,
    LAYOUT,
    block_key,
    make_blocks,
    make_slot,
    open_store,
    requests_for,
    same_block,
)

_ACROSS = 70
"""Blocks of a stream that fills more than a page."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture(params=["redis", "mooncake"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "redis":
        with redis_server(tmp_path) as server:
            yield server.address
    else:
        with mooncake_servers(tmp_path) as servers:
            yield servers.address


def grow(path: Path, first: int, count: int, *, is_complete: bool = False) -> None:
    """Append blocks to the stream, under the cursor that goes with them."""
    with open_store(path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(count, first), {"next": first + count, "is_complete": is_complete})


def push_from(path: Path, address: str) -> int:
    with open_store(path, Access.READ) as store, open_server(address) as server:
        return push(store, server, "lecture").num_moved


def pull_to(path: Path, address: str) -> int:
    with open_store(path) as store, open_server(address) as server:
        return pull(store, server, "lecture").num_moved


def check_same(origin: Path, copy: Path, count: int) -> None:
    """Both stores hold the same stream: manifest, summaries, records and blocks."""
    with open_store(origin, Access.READ) as left, open_store(copy, Access.READ) as right:
        ours, theirs = left.manifest("lecture"), right.manifest("lecture")
        assert ours == replace(theirs, header=replace(theirs.header, created_unix_s=ours.header.created_unix_s))
        assert left.summaries("lecture", 0, count) == right.summaries("lecture", 0, count)
        keys = [entry.key for entry in ours.entries]
        assert len(keys) == count
        for one, other in zip(left.sharing.read(keys), right.sharing.read(keys), strict=True):
            assert one is not None
            assert one == other, "a record is not the same bytes"
        requests = requests_for(make_blocks(count))
        report = right.fetch(requests)
        assert all(outcome.is_hit for outcome in report.outcomes)
        assert all(same_block(request.slot, make_slot(index)) for index, request in enumerate(requests))
        assert right.verify().is_clean


def test_a_stream_travels_and_stays_the_same(tmp_path: Path, address: str) -> None:
    grow(tmp_path / "a", 0, _ACROSS, is_complete=True)
    with (
        open_store(tmp_path / "a", Access.READ) as origin,
        open_store(tmp_path / "b") as copy,
        open_server(address) as server,
    ):
        assert push(origin, server, "lecture").num_moved == _ACROSS
        assert pull(copy, server, "lecture").num_moved == _ACROSS
        assert push(origin, server, "lecture").num_moved == 0, "what is there is not sent again"
        assert pull(copy, server, "lecture").num_moved == 0
    check_same(tmp_path / "a", tmp_path / "b", _ACROSS)


def test_what_has_grown_travels_alone(tmp_path: Path, redis: RedisServer) -> None:
    for first, count in ((0, 3), (3, 61), (64, 5)):
        grow(tmp_path / "a", first, count)
        assert push_from(tmp_path / "a", redis.address) == count
        assert pull_to(tmp_path / "b", redis.address) == count
        check_same(tmp_path / "a", tmp_path / "b", first + count)


def test_a_pulled_stream_can_be_continued_and_pushed_back(tmp_path: Path, redis: RedisServer) -> None:
    grow(tmp_path / "a", 0, 4)
    push_from(tmp_path / "a", redis.address)
    pull_to(tmp_path / "b", redis.address)
    grow(tmp_path / "b", 4, 3)
    assert push_from(tmp_path / "b", redis.address) == 3
    assert pull_to(tmp_path / "a", redis.address) == 3
    check_same(tmp_path / "b", tmp_path / "a", 7)


def test_an_open_store_goes_on_appending_after_a_pull(tmp_path: Path, redis: RedisServer) -> None:
    grow(tmp_path / "a", 0, 4)
    push_from(tmp_path / "a", redis.address)
    with open_store(tmp_path / "b") as store, open_server(redis.address) as server:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(2), {"next": 2})
        assert pull(store, server, "lecture").num_moved == 2
        store.append("lecture", make_blocks(1, 4), {"next": 5})
        store.flush()
        assert len(store.manifest("lecture").entries) == 5
        assert store.verify().is_clean


def test_lossy_streams_travel_with_their_calibration(tmp_path: Path, redis: RedisServer) -> None:
    header = replace(HEADER, profile=Profile.Q4)
    stores = [
        Store.open(tmp_path / name, access=Access.WRITE, layout=LAYOUT, profile=Profile.Q4, host_nbytes=1 << 20)
        for name in ("a", "b")
    ]
    count = 130
    with stores[0] as origin, stores[1] as copy, open_server(redis.address) as server:
        origin.create_stream(header)
        blocks = make_blocks(count)
        for index, block in enumerate(blocks):  # numbers as models have them: random bytes are infinite or no numbers
            torch.manual_seed(index)
            LAYOUT.keys(block.slot).normal_()
            LAYOUT.values(block.slot).normal_()
            origin.append("lecture", [block], {"next": index + 1})
            origin.flush()
        keys = [block.entry.key for block in blocks]
        assert origin.sharing.calibrations_of(keys), "the first blocks are enough to calibrate the model"
        push(origin, server, "lecture")
        assert pull(copy, server, "lecture").num_moved == count
        ours, theirs = requests_for(blocks), requests_for(blocks)
        assert all(outcome.is_hit for outcome in origin.fetch(ours).outcomes)
        assert all(outcome.is_hit for outcome in copy.fetch(theirs).outcomes)
        assert list(origin.sharing.read(keys)) == list(copy.sharing.read(keys))
        decided = [store.calibrations.of_model(HEADER.spec) for store in (origin, copy)]
        assert decided[0] == decided[1] is not None
        assert copy.verify().is_clean


def test_a_broken_off_pull_goes_on(tmp_path: Path, redis: RedisServer) -> None:
    grow(tmp_path / "a", 0, 10)
    push_from(tmp_path / "a", redis.address)
    lost = _texts(redis, 10)[6]
    kept = redis.value(lost)
    redis.command("DEL", lost)
    with pytest.raises(CorruptRecordError, match="1 of 10 blocks"):
        pull_to(tmp_path / "b", redis.address)
    with open_store(tmp_path / "b", Access.READ) as store:
        assert store.streams() == [], "a stream appears whole"
    redis.command("SET", lost, kept)
    assert pull_to(tmp_path / "b", redis.address) == 1, "the others have arrived already"
    check_same(tmp_path / "a", tmp_path / "b", 10)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["a-bit", "no-record"])
def test_damage_on_the_server_is_noticed_and_mended_by_the_next_push(
    tmp_path: Path, redis: RedisServer, is_sealed: bool
) -> None:
    grow(tmp_path / "a", 0, 4)
    push_from(tmp_path / "a", redis.address)
    text = _texts(redis, 4)[2]
    value = redis.value(text)
    flipped = value[:500] + bytes([value[500] ^ 1]) + value[501:]
    redis.command("SET", text, _sealed_garbage(value) if is_sealed else flipped)
    with pytest.raises(CorruptRecordError, match="1 of 4 blocks"):
        pull_to(tmp_path / "b", redis.address)
    assert push_from(tmp_path / "a", redis.address) == 1
    assert pull_to(tmp_path / "b", redis.address) == 1
    check_same(tmp_path / "a", tmp_path / "b", 4)


def test_streams_that_have_gone_their_own_ways_are_not_mixed(tmp_path: Path, redis: RedisServer) -> None:
    grow(tmp_path / "a", 0, 4)
    push_from(tmp_path / "a", redis.address)
    with open_store(tmp_path / "b") as store:
        store.create_stream(HEADER)
        other = make_blocks(3)
        store.append("lecture", [*other[:2], replace(other[2], entry=replace(other[2].entry, key=block_key(77)))], {})
    with pytest.raises(ConfigError, match="gone its own way from entry 2"):
        pull_to(tmp_path / "b", redis.address)
    with open_store(tmp_path / "c") as store:
        store.create_stream(replace(HEADER, prefill="otherwise"))
    with pytest.raises(ConfigError):
        pull_to(tmp_path / "c", redis.address)


def test_a_stream_that_is_ahead_has_nothing_to_pull(tmp_path: Path, redis: RedisServer) -> None:
    grow(tmp_path / "a", 0, 3)
    push_from(tmp_path / "a", redis.address)
    grow(tmp_path / "a", 3, 3)
    assert pull_to(tmp_path / "a", redis.address) == 0
    with open_store(tmp_path / "a", Access.READ) as store:
        assert len(store.manifest("lecture").entries) == 6


def test_what_is_not_there_is_named(tmp_path: Path, redis: RedisServer) -> None:
    with pytest.raises(StreamNotFoundError, match="lecture"):
        pull_to(tmp_path / "b", redis.address)
    with pytest.raises(StreamNotFoundError):
        push_from(tmp_path / "b", redis.address)
    redis.kill()
    grow(tmp_path / "a", 0, 1)
    with pytest.raises(StoreIOError):
        push_from(tmp_path / "a", redis.address)
    with pytest.raises(StoreIOError):
        pull_to(tmp_path / "b", redis.address)


def test_a_full_server_says_so(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as server:
        grow(tmp_path / "a", 0, 200)
        with pytest.raises(CapacityError):
            push_from(tmp_path / "a", server.address)


def _texts(redis: RedisServer, count: int) -> list[str]:
    space = Namespace("tests", LAYOUT.spec.fingerprint)
    texts = [space.key(Kind.BLOCK, block_key(number)) for number in range(count)]
    assert all(redis.command("EXISTS", text) == 1 for text in texts)
    return texts


def _sealed_garbage(value: bytes) -> bytes:
    """A sound envelope around bytes that are no record."""
    data = bytearray(value[:ENVELOPE_NBYTES] + b"x" * 1000)
    seal(memoryview(data), Kind.BLOCK, Namespace("tests", LAYOUT.spec.fingerprint).fingerprint, block_key(2))
    return bytes(data)
