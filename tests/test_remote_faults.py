# SPDX-License-Identifier: Apache-2.0
"""Servers that hang, die, restart, fill up or hold other bytes: calls end in time, and never with a wrong block."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.layout import BlockLayout
from kvstore.remote.address import open_server
from kvstore.remote.breaker import BreakerConfig
from kvstore.remote.envelope import Kind
from kvstore.remote.lane import LaneConfig
from kvstore.remote.server import RemoteConfig
from kvstore.remote.tier import RemoteTier, block_space
from kvstore.stats import BreakerState
from kvstore.tiers.base import Outcome
from tests.remote_servers import MooncakeServers, RedisServer, mooncake_servers, need_mooncake, redis_server, wait_for
from tests.store_blocks import LAYOUT, SPEC, block_key, empty_slot, make_slot, same_block

_DEADLINE_S = 0.4
_HURRIED = RemoteConfig(
    deadline_s=_DEADLINE_S,
    lanes=LaneConfig(deadline_s=3.0, patience_s=0.2),
    breaker=BreakerConfig(max_failures=3, first_wait_s=0.2, max_wait_s=0.5),
)
_SLACK_S = 15.0
"""For a busy machine; what is left alone by a deadline takes 30 s and more."""
_PATIENCE_S = 60.0
"""For calls that a sound server answers, however busy the machine is."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def mooncake(tmp_path: Path) -> Iterator[MooncakeServers]:
    with mooncake_servers(tmp_path) as servers:
        yield servers


def open_tier(address: str, config: RemoteConfig = _HURRIED, layout: BlockLayout = LAYOUT) -> RemoteTier:
    server = open_server(address, config)
    assert server.is_reachable(30.0)
    return RemoteTier(server, layout)


def put(tier: RemoteTier, *numbers: int) -> list[Outcome]:
    keys = [block_key(number) for number in numbers]
    return tier.put(keys, [make_slot(number) for number in numbers], [40] * len(keys), timeout_s=_PATIENCE_S)


def get(tier: RemoteTier, *numbers: int, timeout_s: float | None = _PATIENCE_S) -> list[Outcome]:
    """Read blocks within the deadline; a hit must hold the right bytes."""
    slots = [empty_slot() for _ in numbers]
    began_s = time.monotonic()
    outcomes = tier.get([block_key(number) for number in numbers], slots, timeout_s=timeout_s)
    assert time.monotonic() - began_s < (timeout_s or _DEADLINE_S) + _SLACK_S
    for number, slot, outcome in zip(numbers, slots, outcomes, strict=True):
        assert not outcome.is_hit or same_block(slot, make_slot(number)), f"block {number} holds other bytes"
    return outcomes


def is_kept(tier: RemoteTier, number: int) -> bool:
    """Put a block and read it: Mooncake calls one stored whose earlier put failed and is still being undone."""
    return put(tier, number) == [Outcome.STORED] and get(tier, number) == [Outcome.REMOTE]


def text(number: int) -> str:
    """What the server calls a block."""
    return block_space(open_server("redis://localhost/tests").namespace, LAYOUT).key(Kind.BLOCK, block_key(number))


def check_a_hang(tier: RemoteTier) -> None:
    """While the server hangs: calls end in time, then at once; the breaker is open and the counters tell."""
    for _ in range(40):
        (outcome,) = get(tier, 0, timeout_s=None)
        assert outcome in (Outcome.TIMED_OUT, Outcome.UNAVAILABLE)
        if tier.stats().breaker is not BreakerState.CLOSED:
            break
    stats = tier.stats()
    assert stats.breaker_opened >= 1
    assert stats.timed_out + stats.unavailable >= 1
    began_s = time.monotonic()
    while tier.stats().breaker is not BreakerState.OPEN:
        get(tier, 0, timeout_s=None)
        assert time.monotonic() - began_s < _SLACK_S
    began_s = time.monotonic()
    for _ in range(100):
        assert get(tier, 0)[0] in (Outcome.TIMED_OUT, Outcome.UNAVAILABLE)
    assert time.monotonic() - began_s < 100 * _DEADLINE_S / 4, "all but the trials end at once"
    assert put(tier, 7) in ([Outcome.UNAVAILABLE], [Outcome.TIMED_OUT])
    assert tier.exists([block_key(0)]) == [False]
    assert tier.remove([block_key(0)]) == [False]


def test_a_hung_redis_costs_a_deadline_then_nothing_and_comes_back(redis: RedisServer) -> None:
    with open_tier(redis.address) as tier:
        assert put(tier, 0) == [Outcome.STORED]
        redis.stop()
        check_a_hang(tier)
        redis.go_on()
        wait_for(lambda: get(tier, 0) == [Outcome.REMOTE], "the block, now that the server goes on")
        assert tier.stats().breaker is BreakerState.CLOSED


def test_a_killed_redis_is_unavailable_and_empty_after_its_restart(redis: RedisServer) -> None:
    with open_tier(redis.address) as tier:
        assert put(tier, 0) == [Outcome.STORED]
        redis.kill()
        outcomes = [get(tier, 0, timeout_s=None)[0] for _ in range(6)]
        assert set(outcomes) <= {Outcome.UNAVAILABLE, Outcome.TIMED_OUT}
        assert tier.stats().breaker_opened >= 1
        redis.start()
        wait_for(lambda: get(tier, 0) == [Outcome.MISS], "a miss, now that an empty server is there")
        assert put(tier, 0) == [Outcome.STORED]
        assert get(tier, 0) == [Outcome.REMOTE]


def test_a_full_redis_is_full_and_serves_what_it_has(tmp_path: Path) -> None:
    with (
        redis_server(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server,
        open_tier(server.address) as tier,
    ):
        outcomes = put(tier, *range(400))
        assert set(outcomes) == {Outcome.STORED, Outcome.FULL}
        stored = [number for number, outcome in enumerate(outcomes) if outcome is Outcome.STORED]
        assert set(get(tier, *stored[:5])) == {Outcome.REMOTE}
        assert tier.stats().full == outcomes.count(Outcome.FULL)
        assert tier.stats().breaker is BreakerState.CLOSED, "a full server is a healthy one"


@pytest.mark.parametrize(
    "plant",
    [
        lambda value: value[:-1],
        lambda value: value[:40],
        lambda value: value[:80],
        lambda value: b"",
        lambda value: value + b"\0",
        lambda value: b"garbage" * 1000,
        lambda value: b"\0" * len(value),
        lambda value: value[:200] + bytes([value[200] ^ 1]) + value[201:],
        lambda value: value[:8] + bytes([value[8] ^ 1]) + value[9:],
        lambda value: value + bytes(8 << 20),
    ],
    ids=["cut", "cut-envelope", "no-record", "empty", "longer", "garbage", "zeros", "bit", "length", "huge"],
)
def test_planted_values_are_damaged_and_replaced_by_the_next_put(redis: RedisServer, plant: object) -> None:
    assert callable(plant)
    with open_tier(redis.address) as tier:
        assert put(tier, 0, 1, 2) == [Outcome.STORED] * 3
        redis.command("SET", text(1), plant(redis.value(text(1))))
        assert get(tier, 0, 1, 2) == [Outcome.REMOTE, Outcome.DAMAGED, Outcome.REMOTE]
        assert tier.stats().tier.damaged == 1
        assert put(tier, 1) == [Outcome.STORED]
        assert get(tier, 1) == [Outcome.REMOTE]


def test_every_damaged_byte_is_noticed(redis: RedisServer) -> None:
    with open_tier(redis.address) as tier:
        put(tier, 0)
        sound = redis.value(text(0))
        for position in [*range(130), *range(130, len(sound), 997), len(sound) - 1]:
            redis.command("SET", text(0), sound[:position] + bytes([sound[position] ^ 0x40]) + sound[position + 1 :])
            assert get(tier, 0) == [Outcome.DAMAGED], f"byte {position}"


def test_a_value_of_another_block_or_type_is_damaged(redis: RedisServer) -> None:
    with open_tier(redis.address) as tier:
        put(tier, 0, 1)
        redis.command("SET", text(0), redis.value(text(1)))
        redis.command("DEL", text(1))
        redis.command("LPUSH", text(1), "somebody", "else's")
        assert get(tier, 0, 1, 2) == [Outcome.DAMAGED, Outcome.DAMAGED, Outcome.MISS]


def test_namespaces_and_models_do_not_see_each_other(redis: RedisServer) -> None:
    other_model = BlockLayout(replace(SPEC, revision="1"), 40)
    with open_tier(redis.address) as tier, open_tier(redis.address.replace("/tests", "/others")) as others:
        put(tier, 0)
        assert get(others, 0) == [Outcome.MISS]
        assert others.remove([block_key(0)]) == [False]
        with open_tier(redis.address, layout=other_model) as same_namespace:
            assert same_namespace.exists([block_key(0)]) == [False]
        # Even when a value lands under another namespace's name, it says where it belongs.
        redis.command("SET", text(0).replace(":tests:", ":others:"), redis.value(text(0)))
        assert get(others, 0) == [Outcome.DAMAGED]


def test_a_password_is_asked_for_and_told_to_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with redis_server(tmp_path, "--requirepass", "s3cret") as server:
        with open_tier(server.address.replace("//", "//:s3cret@")) as tier:
            assert put(tier, 0) == [Outcome.STORED]
        wrong = open_server(server.address.replace("//", "//:other@"), _HURRIED)
        assert not wrong.is_reachable(5.0)
        with RemoteTier(wrong, LAYOUT) as tier:
            assert put(tier, 0) == [Outcome.UNAVAILABLE]
        assert "s3cret" not in caplog.text + wrong.place
        assert "other" not in caplog.text + wrong.place


def test_a_hung_mooncake_client_costs_a_deadline_then_nothing(mooncake: MooncakeServers) -> None:
    with open_tier(mooncake.address) as tier:
        assert put(tier, 0) == [Outcome.STORED]
        assert get(tier, 0) == [Outcome.REMOTE]
        mooncake.stop_client()
        check_a_hang(tier)


def test_a_killed_mooncake_client_loses_its_blocks_and_nothing_else(mooncake: MooncakeServers) -> None:
    with open_tier(mooncake.address) as tier:
        assert put(tier, 0) == [Outcome.STORED]
        mooncake.kill_client()
        outcome = get(tier, 0, timeout_s=None)[0]
        assert outcome in (Outcome.UNAVAILABLE, Outcome.TIMED_OUT, Outcome.MISS)
        mooncake.start_client()
        wait_for(lambda: is_kept(tier, 1), "room on the new client")


def test_a_killed_mooncake_master_is_unavailable_until_it_is_back(mooncake: MooncakeServers) -> None:
    with open_tier(mooncake.address) as tier:
        assert put(tier, 0) == [Outcome.STORED]
        mooncake.kill_master()
        for _ in range(6):
            assert get(tier, 0, timeout_s=None)[0] in (Outcome.UNAVAILABLE, Outcome.TIMED_OUT)
        assert tier.stats().breaker_opened >= 1
        mooncake.start_master()
        wait_for(lambda: is_kept(tier, 1), "room, now that the client has found the master again")


def workers() -> list[int]:
    """Processes of this one that run Mooncake's library."""
    found = [word for path in Path("/proc/self/task").glob("*/children") for word in path.read_text().split()]
    return [int(pid) for pid in found if b"mooncake_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_crashed_worker_is_replaced_and_none_outlives_its_tier(mooncake: MooncakeServers) -> None:
    with open_tier(mooncake.address) as tier:
        assert put(tier, 0) == [Outcome.STORED]
        (worker,) = workers()
        os.kill(worker, signal.SIGKILL)
        assert get(tier, 0, timeout_s=None)[0] in (Outcome.UNAVAILABLE, Outcome.TIMED_OUT)
        wait_for(lambda: get(tier, 0) == [Outcome.REMOTE], "the block, through another worker")
        assert workers() != [worker]
    assert workers() == []


def test_nobody_at_the_address_is_unavailable(tmp_path: Path) -> None:
    for address in ("redis://127.0.0.1:1/x", f"redis+unix://{tmp_path}/none?namespace=x", "mooncake://127.0.0.1:1/x"):
        if address.startswith("mooncake"):
            need_mooncake()
        with RemoteTier(open_server(address, _HURRIED), LAYOUT) as tier:
            assert set(get(tier, 0, 1) + put(tier, 0)) == {Outcome.UNAVAILABLE}
