# SPDX-License-Identifier: Apache-2.0
"""A remote tier behind a store: it answers for what the disk has lost, is offered what is written, and may fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.remote.address import open_server
from kvstore.remote.breaker import BreakerConfig
from kvstore.remote.lane import LaneConfig
from kvstore.remote.server import RemoteConfig
from kvstore.remote.sharing.pull import pull
from kvstore.remote.sharing.push import push
from kvstore.remote.tier import RemoteTier
from kvstore.stats import BreakerState
from kvstore.store import Access, Outcome, Store, Tier
from tests.remote_servers import MooncakeServers, RedisServer, mooncake_servers, redis_server, wait_for
from tests.store_blocks import (
    HEADER,
    LAYOUT,
    SPEC,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    requests_for,
    same_block,
)

_PATIENCE_S = 60.0
_PATIENT = RemoteConfig(_PATIENCE_S, LaneConfig(deadline_s=_PATIENCE_S, patience_s=_PATIENCE_S))
_HURRIED = RemoteConfig(0.2, LaneConfig(deadline_s=0.2, patience_s=0.1), BreakerConfig(first_wait_s=0.2))


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


def open_tier(redis: RedisServer, offers_nbytes: int = 64 << 20) -> RemoteTier:
    server = open_server(
        redis.address, RemoteConfig(_PATIENCE_S, LaneConfig(deadline_s=_PATIENCE_S, patience_s=_PATIENCE_S))
    )
    return RemoteTier(server, LAYOUT, offers_nbytes=offers_nbytes)


def open_store(path: Path, remote: RemoteTier | None, access: Access = Access.WRITE, slots: int = 2) -> Store:
    return Store.open(path, access=access, layout=LAYOUT, host_nbytes=slots * LAYOUT.slot_nbytes, remote=remote)


def fill(path: Path, redis: RedisServer, count: int) -> None:
    """Append a stream to a store that offers it to the server, and wait until all is there."""
    with open_tier(redis) as tier, open_store(path, tier) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(count), {"next": count})
        store.flush()
        assert tier.flush(_PATIENCE_S)
        assert all(tier.exists([block_key(number) for number in range(count)]))
        assert tier.stats().dropped_offers == 0


def damage(path: Path) -> None:
    """Overwrite all extents."""
    for extents in (path / "extents").iterdir():
        extents.write_bytes(b"\xff" * extents.stat().st_size)


def test_appended_blocks_are_offered_and_answer_for_a_damaged_disk(tmp_path: Path, redis: RedisServer) -> None:
    fill(tmp_path / "a", redis, 6)
    damage(tmp_path / "a")
    with open_tier(redis) as tier, open_store(tmp_path / "a", tier, Access.READ) as store:
        requests = requests_for(make_blocks(6))
        report = store.fetch(requests)
        assert report.outcomes == [Outcome.REMOTE] * 6
        assert all(same_block(request.slot, make_slot(number)) for number, request in enumerate(requests))
        assert report.bytes_read[Tier.REMOTE] == 6 * LAYOUT.slot_nbytes
        assert report.reasons == {}
        assert tier.stats().tier.hits == 6


def test_what_came_from_the_server_stays_in_memory(tmp_path: Path, redis: RedisServer) -> None:
    fill(tmp_path / "a", redis, 2)
    damage(tmp_path / "a")
    with open_tier(redis) as tier, open_store(tmp_path / "a", tier, Access.READ) as store:
        assert store.fetch(requests_for(make_blocks(2))).outcomes == [Outcome.REMOTE] * 2
        redis.kill()
        requests = requests_for(make_blocks(2))
        assert store.fetch(requests).outcomes == [Outcome.HOST] * 2
        assert all(same_block(request.slot, make_slot(number)) for number, request in enumerate(requests))


def test_a_few_layers_touch_no_others(tmp_path: Path, redis: RedisServer) -> None:
    fill(tmp_path / "a", redis, 1)
    damage(tmp_path / "a")
    with open_tier(redis) as tier, open_store(tmp_path / "a", tier, Access.READ) as store:
        (request,) = requests_for(make_blocks(1), range(1, 2))
        assert store.fetch([request]).outcomes == [Outcome.REMOTE]
        for part in (LAYOUT.keys, LAYOUT.values):
            found, wanted = part(request.slot).view(torch.int16), part(make_slot(0)).view(torch.int16)
            assert torch.equal(found[1], wanted[1])
            assert not found[0].any()
            assert not found[2].any()


def test_another_store_reads_blocks_that_it_never_had(tmp_path: Path, redis: RedisServer) -> None:
    fill(tmp_path / "a", redis, 3)
    with open_tier(redis) as tier, open_store(tmp_path / "b", tier) as store:
        slots = [empty_slot() for _ in range(4)]
        keys = [block_key(number) for number in (0, 1, 2, 99)]
        assert store.get(keys, slots) == [Outcome.REMOTE] * 3 + [Outcome.MISS]
        assert all(same_block(slots[number], make_slot(number)) for number in range(3))


def test_a_disk_that_has_all_asks_nobody(tmp_path: Path, redis: RedisServer) -> None:
    fill(tmp_path / "a", redis, 3)
    with open_tier(redis) as tier, open_store(tmp_path / "a", tier) as store:
        assert store.fetch(requests_for(make_blocks(3))).outcomes == [Outcome.DISK] * 3
        assert tier.stats().tier.hits == tier.stats().tier.misses == 0


FAILURES: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "redis-hangs": (redis_server, RedisServer.stop),
    "redis-is-killed": (redis_server, RedisServer.kill),
    "mooncake-client-hangs": (mooncake_servers, MooncakeServers.stop_client),
    "mooncake-client-is-killed": (mooncake_servers, MooncakeServers.kill_client),
    "mooncake-master-is-killed": (mooncake_servers, MooncakeServers.kill_master),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_store_goes_on_whatever_becomes_of_the_server(tmp_path: Path, name: str) -> None:
    start, fail = FAILURES[name]
    with start(tmp_path) as server:
        remote = open_server(server.address, _HURRIED)
        assert remote.is_reachable(_PATIENCE_S)
        with (
            RemoteTier(remote, LAYOUT, offers_nbytes=4 * LAYOUT.slot_nbytes) as tier,
            open_store(tmp_path / "a", tier) as store,
        ):
            store.create_stream(HEADER)
            store.append("lecture", make_blocks(4), {"next": 4})
            store.flush()
            tier.flush(_PATIENCE_S)
            fail(server)
            for first in range(4, 40, 4):
                store.append("lecture", make_blocks(4, first), {"next": first + 4})
            store.flush()
            assert len(store.manifest("lecture").entries) == 40, "acknowledged, whatever the server does"
            began_s = time.monotonic()
            requests = requests_for(make_blocks(40))
            assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
            assert all(same_block(request.slot, make_slot(index)) for index, request in enumerate(requests))
            for _ in range(10):  # blocks that nobody has: the breaker keeps these from waiting each time
                assert store.get([block_key(999)], [empty_slot()]) == [Outcome.MISS]
            assert time.monotonic() - began_s < 60.0
            stats = tier.stats()
            told = (stats.queued_offers, stats.dropped_offers, stats.timed_out, stats.unavailable, stats.tier.misses)
            assert sum(told) > 0, "the counters tell"


def test_a_server_that_goes_on_is_taken_back(tmp_path: Path, redis: RedisServer) -> None:
    with (
        RemoteTier(open_server(redis.address, _HURRIED), LAYOUT) as tier,
        open_store(tmp_path / "a", tier) as store,
    ):
        redis.stop()
        while tier.stats().breaker is not BreakerState.OPEN:
            assert store.get([block_key(999)], [empty_slot()]) == [Outcome.MISS]
        redis.go_on()
        wait_for(lambda: tier.put([block_key(0)], [make_slot(0)], [40]) == [Outcome.STORED], "the server again")
        wait_for(lambda: store.get([block_key(0)], [empty_slot()])[0].is_hit, "the block behind the store")


def test_a_stream_is_pulled_although_its_blocks_were_read_through_the_server(
    tmp_path: Path, redis: RedisServer
) -> None:
    fill(tmp_path / "a", redis, 4)
    with open_server(redis.address) as server, open_tier(redis) as tier:
        with open_store(tmp_path / "a", None) as origin:
            push(origin, server, "lecture")
        with open_store(tmp_path / "b", tier, slots=8) as store:
            assert store.fetch(requests_for(make_blocks(2))).outcomes == [Outcome.REMOTE] * 2
            assert pull(store, server, "lecture").num_moved == 4, "memory is no place for a stream"
            assert store.verify().is_clean
    with open_store(tmp_path / "b", None, Access.READ) as store:
        assert store.fetch(requests_for(make_blocks(4))).outcomes == [Outcome.DISK] * 4


def test_a_tier_of_another_layout_is_refused(tmp_path: Path, redis: RedisServer) -> None:
    layout = BlockLayout(replace(SPEC, num_layers=2), 40)
    with RemoteTier(open_server(redis.address), layout) as tier, pytest.raises(ConfigError, match="another layout"):
        open_store(tmp_path / "a", tier)
    open_store(tmp_path / "a", None).close()
