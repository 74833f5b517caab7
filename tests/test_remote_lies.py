# SPDX-License-Identifier: Apache-2.0
"""Lies inside sound envelopes: what a server claims behind a right checksum costs little, and fills no slot."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.calibration import Calibration
from kvstore.codec import Codec, Profile
from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError, KVStoreError, StoreIOError
from kvstore.layout import BlockLayout
from kvstore.remote import objects
from kvstore.remote.address import open_server
from kvstore.remote.calibrations import most_nbytes
from kvstore.remote.envelope import ENVELOPE_NBYTES, Kind, Namespace, seal
from kvstore.remote.objects import object_key
from kvstore.remote.resp import Endpoint, RespConnection
from kvstore.remote.server import RemoteServer
from kvstore.remote.sharing.messenger import Messenger
from kvstore.remote.sharing.pull import pull
from kvstore.remote.tier import RemoteTier, block_space
from kvstore.spec import ModelSpec
from kvstore.store import Access, Outcome, Store
from tests.codec_slots import fitted
from tests.device_blocks import make_calibration
from tests.remote_servers import RedisServer, redis_server
from tests.store_blocks import LAYOUT, SPEC, block_key, empty_slot, make_slot, same_block

SPACE = Namespace("tests")
PART_NBYTES = 1 << 20


class OneCalibration:
    """A model's calibration and the decision for it, without a store."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration

    def find(self, identity: bytes) -> Calibration | None:
        if identity != self._calibration.id:
            raise CorruptRecordError("not here")
        return self._calibration

    def of_model(self, spec: ModelSpec) -> Decision | None:
        return Decision(self._calibration.id, 4096, "a test")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return make_calibration(LAYOUT, smooth_slot(0))


def smooth_slot(number: int) -> Tensor:
    """A block of numbers as models have them."""
    torch.manual_seed(number)
    slot = empty_slot()
    LAYOUT.keys(slot).normal_()
    LAYOUT.values(slot).normal_()
    return slot


def plant(redis: RedisServer, kind: Kind, key: bytes, payload: bytes, space: Namespace = SPACE) -> None:
    """Store a payload in a sound envelope."""
    value = bytearray(ENVELOPE_NBYTES) + payload
    seal(memoryview(value), kind, space.fingerprint, key)
    redis.command("SET", space.key(kind, key), bytes(value))


def plant_object(redis: RedisServer, key: bytes, total: int, *parts: bytes) -> None:
    """Store a head that claims `total` bytes, and parts."""
    names = [hashlib.blake2b(part, digest_size=32).digest() for part in parts]
    for name, part in dict(zip(names, parts, strict=True)).items():
        plant(redis, Kind.PART, name, part)
    plant(redis, Kind.HEAD, key, struct.pack("<Q", total) + b"".join(names))


def num_gets(redis: RedisServer) -> int:
    """How often the server was asked for a value."""
    connection = RespConnection(Endpoint("127.0.0.1", redis.port), time.monotonic() + 10)
    try:
        connection.send([[b"INFO", b"commandstats"]], time.monotonic() + 10)
        room = bytearray(1 << 16)
        nbytes = connection.read_value(memoryview(room))
        assert isinstance(nbytes, int)
    finally:
        connection.close()
    lines = [line for line in room[:nbytes].decode().splitlines() if line.startswith("cmdstat_get:")]
    return int(lines[0].partition("calls=")[2].partition(",")[0]) if lines else 0


def test_a_calibration_of_a_gibibyte_is_not_fetched_and_harms_no_other_block(
    redis: RedisServer, calibration: Calibration
) -> None:
    with RemoteTier(open_server(redis.address), LAYOUT, Profile.Q4, calibrations=OneCalibration(calibration)) as origin:
        assert origin.put([block_key(0)], [smooth_slot(0)], [40]) == [Outcome.STORED]
    with RemoteTier(open_server(redis.address), LAYOUT) as exact:
        assert exact.put([block_key(1)], [make_slot(1)], [40]) == [Outcome.STORED]
    key = object_key("calibration", calibration.id)
    part = bytes(PART_NBYTES)
    plant_object(redis, key, 1 << 30, *[part] * 1024)
    before = num_gets(redis)
    with RemoteTier(open_server(redis.address), LAYOUT, Profile.Q4) as tier:
        slots = [empty_slot(), empty_slot()]
        outcomes = tier.get([block_key(0), block_key(1)], slots, timeout_s=30.0)
        assert outcomes == [Outcome.DAMAGED, Outcome.REMOTE]
        assert not slots[0].any()
        assert same_block(slots[1], make_slot(1))
        for _ in range(10):
            assert tier.get([block_key(0)], [empty_slot()], timeout_s=30.0) == [Outcome.DAMAGED]
    assert num_gets(redis) - before <= 2 + 1 + 10, "two blocks, one head, and each block again; no part of the lie"


def test_a_calibration_of_the_right_size_and_another_content_is_refused(
    redis: RedisServer, calibration: Calibration
) -> None:
    with RemoteTier(open_server(redis.address), LAYOUT, Profile.Q4, calibrations=OneCalibration(calibration)) as origin:
        origin.put([block_key(0)], [smooth_slot(0)], [40])
    data = calibration.data[:-1] + bytes([calibration.data[-1] ^ 1])
    plant_object(redis, object_key("calibration", calibration.id), len(data), data)
    with RemoteTier(open_server(redis.address), LAYOUT, Profile.Q4) as tier:
        assert tier.get([block_key(0)], [empty_slot()], timeout_s=30.0) == [Outcome.DAMAGED]


def test_a_calibration_is_fetched_where_it_is_not_known(redis: RedisServer, calibration: Calibration) -> None:
    assert len(calibration.data) <= most_nbytes(SPEC)
    with RemoteTier(open_server(redis.address), LAYOUT, Profile.Q4, calibrations=OneCalibration(calibration)) as origin:
        origin.put([block_key(0)], [smooth_slot(0)], [40])
        ours = empty_slot()
        assert origin.get([block_key(0)], [ours], timeout_s=30.0) == [Outcome.REMOTE]
    with RemoteTier(open_server(redis.address), LAYOUT, Profile.Q4) as tier:
        theirs = empty_slot()
        assert tier.get([block_key(0)], [theirs], timeout_s=30.0) == [Outcome.REMOTE]
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(2, 1, 64, 32), (5, 2, 16, 16), (1, 3, 8, 40)])
def test_no_calibration_is_larger_than_is_fetched(shape: tuple[int, int, int, int]) -> None:
    layers, heads, key_dim, value_dim = shape
    spec = replace(SPEC, num_layers=layers, kv_heads=heads, key_dim=key_dim, value_dim=value_dim)
    torch.manual_seed(0)
    sample = (torch.randn(layers, heads, 4096, key_dim) * 9, torch.randn(layers, heads, 4096, value_dim) * 9)
    found = fitted([sample], with_bases=True)
    assert found.has_bases
    assert len(found.data) <= most_nbytes(spec)


def _record(layout: BlockLayout, num_tokens: int) -> bytes:
    """A sound record of zeros."""
    codec = Codec(layout, Profile.LOSSLESS)
    room = bytearray(codec.bound(num_tokens))
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    return bytes(room[: codec.encode(slot, num_tokens, 0, memoryview(room))])


RECORDS = {
    "of fewer layers": _record(BlockLayout(replace(SPEC, num_layers=2), 40), 40),
    "of more layers": _record(BlockLayout(replace(SPEC, num_layers=4), 40), 40),
    "of other heads": _record(BlockLayout(replace(SPEC, kv_heads=1), 40), 40),
    "of another dtype": _record(BlockLayout(replace(SPEC, dtype="float16"), 40), 40),
    "of more tokens": _record(BlockLayout(SPEC, 41), 41),
    "cut off": _record(LAYOUT, 40)[:-1],
    "longer": _record(LAYOUT, 40) + b"\0",
    "empty": b"",
    "no record": bytes(1000),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_does_not_fit_is_damaged_and_touches_no_slot(redis: RedisServer, name: str) -> None:
    with RemoteTier(open_server(redis.address), LAYOUT) as tier:
        plant(redis, Kind.BLOCK, block_key(0), RECORDS[name], block_space(SPACE, LAYOUT))
        slot = torch.full((LAYOUT.slot_nbytes,), 7, dtype=torch.uint8)
        assert tier.get([block_key(0)], [slot], timeout_s=30.0) == [Outcome.DAMAGED]
        assert torch.equal(slot, torch.full_like(slot, 7))
        assert tier.put([block_key(0)], [make_slot(0)], [40], timeout_s=30.0) == [Outcome.STORED]
        assert tier.get([block_key(0)], [slot], timeout_s=30.0) == [Outcome.REMOTE]
        assert same_block(slot, make_slot(0))


HEADS: dict[str, tuple[int, list[bytes]]] = {
    "no parts": (5, []),
    "more parts than bytes": (5, [b"hello", b"hello"]),
    "fewer bytes than announced": (5, [b"hell"]),
    "more bytes than announced": (5, [b"hello!"]),
    "beyond 63 bits": (1 << 63, [b"hello"]),
    "larger than heads are": (1 << 25, [bytes(PART_NBYTES)] * 32),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_a_stream_that_claims_other_parts_is_damaged(tmp_path: Path, redis: RedisServer, name: str) -> None:
    total, parts = HEADS[name]
    plant_object(redis, object_key("stream", b"lecture"), total, *parts)
    with open_server(redis.address) as server, Store.open(tmp_path / "a", access=Access.WRITE) as store:
        with pytest.raises(CorruptRecordError):
            pull(store, server, "lecture")
        assert store.streams() == []
    assert num_gets(redis) <= 2


def test_a_part_that_is_gone_or_another_one_is_noticed(redis: RedisServer) -> None:
    key = object_key("stream", b"lecture")
    with open_server(redis.address) as server:
        plant_object(redis, key, 5, b"hello")
        name = hashlib.blake2b(b"hello", digest_size=32).digest()
        assert Messenger(server, None).fetch_head("lecture") == b"hello"
        plant(redis, Kind.PART, name, b"other")
        with pytest.raises(CorruptRecordError):
            Messenger(server, None).fetch_head("lecture")
        redis.command("DEL", SPACE.key(Kind.PART, name))
        assert Messenger(server, None).fetch_head("lecture") is None


def test_all_parts_together_have_one_deadline(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_LEAST_NBYTES_PER_S", 1 << 60)
    key = object_key("stream", b"lecture")
    plant_object(redis, key, 1 << 30, *[bytes(PART_NBYTES)] * 1024)

    def fetch(server: RemoteServer) -> KVStoreError | None:
        try:
            server.lanes.call(lambda lane: objects.fetch_object(lane, SPACE, key, 0.1, 1 << 30), 60.0)
        except KVStoreError as error:
            return error
        return None

    with open_server(redis.address) as server:
        assert server.is_reachable()
        assert isinstance(fetch(server), StoreIOError), "each part comes in time, and all of them do not"
    assert num_gets(redis) < 1024
