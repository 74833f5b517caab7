# SPDX-License-Identifier: Apache-2.0
"""All implementations of `BlockStore`, for the suite that runs against each: one line here adds another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

from torch import Tensor

from kvstore.remote.address import open_server
from kvstore.remote.server import RemoteConfig
from kvstore.remote.tier import RemoteTier
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.block_store import BlockStore
from kvstore.tiers.moving.host_store import HostStore
from tests.remote_servers import mooncake_servers, redis_server
from tests.store_blocks import LAYOUT, block_key, empty_slot, make_slot, open_store

PATIENCE_S = 60.0
_NUMBERS = itertools.count(1)
_PATIENT = RemoteConfig(deadline_s=20.0)
"""A busy machine must not look like a slow server here."""


@contextmanager
def redis_tier(folder: Path) -> Iterator[BlockStore]:
    """Remote tier over TCP to redis-server."""
    with redis_server(folder) as server, RemoteTier(open_server(server.address, _PATIENT), LAYOUT) as tier:
        yield tier


@contextmanager
def redis_socket_tier(folder: Path) -> Iterator[BlockStore]:
    """Remote tier over a Unix socket to redis-server."""
    with redis_server(folder) as server:
        address = f"redis+unix://{server.socket}?namespace=tests&db=3"
        with RemoteTier(open_server(address, _PATIENT), LAYOUT) as tier:
            yield tier


@contextmanager
def mooncake_tier(folder: Path) -> Iterator[BlockStore]:
    """Remote tier to a Mooncake master and a storage client."""
    with mooncake_servers(folder) as servers:
        server = open_server(servers.address, _PATIENT)
        assert server.is_reachable(), "the first call joins the cluster, which takes longer than a deadline"
        with RemoteTier(server, LAYOUT) as tier:
            yield tier


IMPLEMENTATIONS: dict[str, Callable[[Path], AbstractContextManager[BlockStore]]] = {
    "memory": lambda folder: closing(HostStore(LAYOUT, 1000 * LAYOUT.slot_nbytes)),
    "disk": lambda folder: open_store(folder, host_slots=2),
    "disk-behind-memory": lambda folder: open_store(folder, host_slots=1000),
    "redis": redis_tier,
    "redis-socket": redis_socket_tier,
    "mooncake": mooncake_tier,
}
"""Each opens an empty store of `LAYOUT` with room for a thousand blocks; its scratch folder is the argument."""


def fresh(count: int) -> list[int]:
    """Numbers of blocks that no other test has."""
    return list(itertools.islice(_NUMBERS, count))


def keys_of(numbers: list[int]) -> list[BlockKey]:
    """Keys of blocks."""
    return [block_key(number) for number in numbers]


def slots_of(numbers: list[int]) -> list[Tensor]:
    """Blocks."""
    return [make_slot(number) for number in numbers]


def empty_slots(count: int) -> list[Tensor]:
    """Destinations."""
    return [empty_slot() for _ in range(count)]


def put(store: BlockStore, numbers: list[int], num_tokens: int = 40) -> list[Outcome]:
    """Put blocks of so many tokens each."""
    return store.put(keys_of(numbers), slots_of(numbers), [num_tokens] * len(numbers))
