# SPDX-License-Identifier: Apache-2.0
"""What those who watch a store learn of the remote tier behind it: Prometheus, other processes, log readers."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvstore.remote.address import open_server
from kvstore.remote.breaker import BreakerConfig
from kvstore.remote.lane import LaneConfig
from kvstore.remote.server import RemoteConfig
from kvstore.remote.tier import RemoteTier
from kvstore.stats import BreakerState
from kvstore.store import Access, Outcome, Store
from kvstore.watch.live import publish, read_live
from kvstore.watch.metrics import StoreCollector
from tests.remote_servers import RedisServer, redis_server, wait_for
from tests.store_blocks import LAYOUT, block_key, empty_slot, make_slot

_HURRIED = RemoteConfig(
    0.5, LaneConfig(deadline_s=0.4, patience_s=0.2), BreakerConfig(first_wait_s=0.2, max_wait_s=0.2)
)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def tier(redis: RedisServer) -> Iterator[RemoteTier]:
    server = open_server(redis.address, _HURRIED)
    assert server.is_reachable()
    with RemoteTier(server, LAYOUT) as tier:
        yield tier


@pytest.fixture
def store(tmp_path: Path, tier: RemoteTier) -> Iterator[Store]:
    """An empty store with the tier behind it."""
    with Store.open(
        tmp_path / "a", access=Access.WRITE, layout=LAYOUT, host_nbytes=4 * LAYOUT.slot_nbytes, remote=tier
    ) as store:
        yield store


def use(store: Store, tier: RemoteTier, redis: RedisServer) -> None:
    """Read a block from the server, miss another, offer a third; then the server dies and the breaker opens."""
    assert tier.put([block_key(0)], [make_slot(0)], [40], timeout_s=30.0) == [Outcome.STORED]
    assert store.get([block_key(0), block_key(1)], [empty_slot(), empty_slot()]) == [Outcome.REMOTE, Outcome.MISS]
    store.put([block_key(2)], [make_slot(2)], [40])
    assert tier.flush(30.0)
    redis.kill()
    while tier.stats().breaker_opened == 0:
        assert store.get([block_key(1)], [empty_slot()]) == [Outcome.MISS]


def test_a_store_without_a_remote_tier_says_nothing_of_one(tmp_path: Path) -> None:
    with Store.open(tmp_path, access=Access.WRITE) as store:
        assert store.stats().remote is None
        registry = CollectorRegistry()
        registry.register(StoreCollector(store, "s"))
        assert not [family.name for family in registry.collect() if "remote" in family.name]


def test_prometheus_reads_the_breaker_and_what_the_server_did(
    store: Store, tier: RemoteTier, redis: RedisServer
) -> None:
    registry = CollectorRegistry()
    registry.register(StoreCollector(store, "s"))

    def read(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvstore_{name}", {"store": "s", **labels})

    assert read("remote_breaker", state="closed") == 1
    use(store, tier, redis)
    store.put([block_key(3)], [make_slot(3)], [40])
    stats = store.stats().remote
    assert stats is not None
    assert read("lookups_total", tier="remote", outcome="hit") == stats.tier.hits == 1
    assert read("lookups_total", tier="remote", outcome="miss") == stats.tier.misses == 1
    unavailable = read("lookups_total", tier="remote", outcome="unavailable")
    assert unavailable == stats.tier.unavailable > 0
    assert read("bytes_total", tier="remote", operation="read") == stats.tier.read_nbytes > LAYOUT.slot_nbytes // 2
    assert read("blocks_total", tier="remote", operation="write") == stats.tier.written_blocks == 2
    assert read("remote_failures_total", outcome="unavailable") == stats.unavailable >= unavailable
    assert read("remote_failures_total", outcome="timed_out") == stats.timed_out
    assert read("remote_failures_total", outcome="full") == stats.full == 0
    assert read("remote_breaker", state="closed") == 0
    states = [read("remote_breaker", state=state.value) for state in BreakerState]
    assert states.count(1.0) == 1, "one state at a time"
    assert read("remote_breaker_opened_total") == stats.breaker_opened >= 1
    wait_for(lambda: read("remote_dropped_offers_total") == 1, "the third block to be dropped")
    assert read("remote_queued_offers") == 0
    assert read("remote_threads_left_behind") == 0


def test_other_processes_see_the_remote_tier(
    tmp_path: Path, store: Store, tier: RemoteTier, redis: RedisServer
) -> None:
    use(store, tier, redis)
    with publish(store, tmp_path / "a", "watched", interval_s=0.02):
        wait_for(lambda: len(read_live(tmp_path / "a")) == 1, "the counters")
        (live,) = read_live(tmp_path / "a")
        assert live.stats.remote is not None
        assert live.stats.remote.tier == tier.stats().tier
        command = [sys.executable, "-m", "kvstore", "stats", "--store", str(tmp_path / "a")]
        once = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        plain = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
    (row,) = [line.split() for line in once.splitlines() if line.startswith("  remote ")]
    assert row[:3] == ["remote", "1", "1"]
    (line,) = [line for line in once.splitlines() if line.startswith("  remote: breaker ")]
    assert "opened" in line
    told = json.loads(plain)["processes"][0]["stats"]["remote"]
    assert told["breaker"] in list(BreakerState)
    assert told["unavailable"] == tier.stats().unavailable > 0


def test_the_breaker_and_damage_are_lines_of_the_one_log(
    store: Store, tier: RemoteTier, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    time.sleep(1.1)  # at most one line of an event a second: those of the tests before must be over
    with caplog.at_level(logging.DEBUG):
        use(store, tier, redis)
        redis.start()
        wait_for(lambda: tier.get([block_key(0)], [empty_slot()]) == [Outcome.MISS], "the server, empty")
        key = tier._texts([block_key(0)])[0]
        redis.command("SET", key, b"garbage" * 20)
        assert tier.get([block_key(0)], [empty_slot()], timeout_s=30.0) == [Outcome.DAMAGED]
        wait_for(lambda: "remote block damaged" in caplog.text, "its line: an outcome may be known before it is logged")
    ours = [record for record in caplog.records if record.name.startswith("kvstore")]
    assert {record.name for record in ours} == {"kvstore.faults"}, "there is one place to look"
    lines = {line["event"]: line for line in (json.loads(record.getMessage()) for record in ours)}
    assert lines["remote server failed"]["server"] == redis.address.removesuffix("/tests")
    assert lines["remote breaker opened"]["for_s"] == 0.2
    assert "reason" in lines["remote breaker opened"]
    assert lines["remote breaker closed"]["server"] == redis.address.removesuffix("/tests")
    assert lines["remote block damaged"]["key"] == block_key(0).hex()


def test_a_batch_that_nobody_waits_for_is_counted_once(tier: RemoteTier) -> None:
    ticket = tier.submit_get([block_key(7)], [empty_slot()], timeout_s=30.0)
    wait_for(ticket.done, "the answer")
    assert tier.stats().tier.misses == 1
    assert ticket.wait() == [Outcome.MISS]
    assert ticket.done()
    assert tier.stats().tier.misses == 1
