# SPDX-License-Identifier: Apache-2.0
"""A library that hangs and wakes up late: it is left behind with its memory, and others take over."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch

from kvstore.errors import StoreIOError
from kvstore.native import Arena
from kvstore.remote.breaker import BreakerConfig
from kvstore.remote.lane import LaneConfig
from kvstore.remote.server import RemoteConfig, RemoteServer
from kvstore.remote.tier import RemoteTier
from kvstore.remote.transport import Link, Memory, Span
from kvstore.tiers.base import Outcome
from tests.remote_servers import wait_for
from tests.store_blocks import LAYOUT, block_key, empty_slot, make_slot, same_block

_CONFIG = RemoteConfig(
    deadline_s=0.3,
    lanes=LaneConfig(count=2, deadline_s=0.2, patience_s=0.1),
    breaker=BreakerConfig(max_failures=3, first_wait_s=0.1, max_wait_s=0.2),
)


class SleepyLibrary:
    """A server inside the process whose calls heed no deadline: while it sleeps they hang, then they go through."""

    place = "sleepy://"

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.awake = threading.Event()
        self.awake.set()
        self.num_links = 0

    def connect(self, memory: Memory, deadline_s: float) -> Link:
        self.num_links += 1
        return _SleepyLink(self, memoryview(memory))

    def allocate(self, nbytes: int) -> Memory:
        return Arena(nbytes, False)

    def free(self, memory: Memory) -> None:
        pass

    def close(self) -> None:
        pass


class _SleepyLink:
    def __init__(self, library: SleepyLibrary, memory: memoryview) -> None:
        self._library = library
        self._memory = memory

    def put(
        self, keys: Sequence[str], values: Sequence[Span], deadline_s: float, *, replace: bool = False
    ) -> list[Outcome]:
        self._library.awake.wait()
        for key, value in zip(keys, values, strict=True):
            self._library.values[key] = bytes(self._memory[value.offset : value.offset + value.nbytes])
        return [Outcome.STORED] * len(keys)

    def get(self, keys: Sequence[str], rooms: Sequence[Span], deadline_s: float) -> list[int | Outcome]:
        self._library.awake.wait()
        found: list[int | Outcome] = []
        for key, room in zip(keys, rooms, strict=True):
            value = self._library.values.get(key)
            if value is not None:
                self._memory[room.offset : room.offset + len(value)] = value
            found.append(Outcome.MISS if value is None else len(value))
        return found

    def exists(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        self._library.awake.wait()
        return [key in self._library.values for key in keys]

    def remove(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        self._library.awake.wait()
        return [self._library.values.pop(key, None) is not None for key in keys]

    def close(self) -> None:
        self._memory.release()


def test_what_wakes_up_late_writes_to_no_slot_and_the_server_is_taken_back() -> None:
    library = SleepyLibrary()
    with RemoteTier(RemoteServer(library, "tests", _CONFIG), LAYOUT) as tier:
        assert tier.put([block_key(0)], [make_slot(0)], [40], timeout_s=60) == [Outcome.STORED]
        library.awake.clear()
        slots = [empty_slot() for _ in range(12)]
        for slot in slots:
            began_s = time.monotonic()
            assert tier.get([block_key(0)], [slot])[0] in (Outcome.TIMED_OUT, Outcome.UNAVAILABLE)
            assert time.monotonic() - began_s < 15.0
        assert tier.stats().breaker_opened > 0
        library.awake.set()
        found = empty_slot()
        wait_for(lambda: tier.get([block_key(0)], [found]) == [Outcome.REMOTE], "the server, awake again")
        assert same_block(found, make_slot(0))
        wait_for(lambda: tier.stats().threads_left_behind == 0, "the threads that woke up late to end")
        assert not any(torch.any(slot) for slot in slots), "written to after its outcome was known"


def test_a_put_that_wakes_up_late_stores_what_was_given_then() -> None:
    library = SleepyLibrary()
    with RemoteTier(RemoteServer(library, "tests", _CONFIG), LAYOUT) as tier:
        assert tier.put([block_key(9)], [make_slot(9)], [40], timeout_s=60) == [Outcome.STORED]
        library.awake.clear()
        slot = make_slot(0)
        assert tier.put([block_key(0)], [slot], [40]) in ([Outcome.TIMED_OUT], [Outcome.UNAVAILABLE])
        slot.fill_(7)
        library.awake.set()
        wait_for(lambda: tier.get([block_key(9)], [empty_slot()]) == [Outcome.REMOTE], "the server, awake again")
        found = empty_slot()
        outcome = tier.get([block_key(0)], [found])[0]
        assert outcome is Outcome.MISS or same_block(found, make_slot(0))


def test_threads_that_hang_are_replaced_and_are_few() -> None:
    library = SleepyLibrary()
    config = RemoteConfig(0.05, LaneConfig(2, 0.05, 0.02), BreakerConfig(max_failures=10**9))
    with RemoteTier(RemoteServer(library, "tests", config), LAYOUT) as tier:
        library.awake.clear()
        for _ in range(60):
            tier.get([block_key(0)], [empty_slot()])
        assert 1 <= tier.stats().threads_left_behind <= 8
        assert library.num_links <= 8 + 2
        library.awake.set()
        wait_for(lambda: tier.get([block_key(0)], [empty_slot()]) == [Outcome.MISS], "the server, awake again")


def test_closing_leaves_behind_what_hangs() -> None:
    library = SleepyLibrary()
    tier = RemoteTier(RemoteServer(library, "tests", _CONFIG), LAYOUT)
    library.awake.clear()
    ticket = tier.submit_get([block_key(0)], [empty_slot()])
    began_s = time.monotonic()
    tier.close()
    assert time.monotonic() - began_s < 15.0
    assert ticket.wait(15.0) is not None
    assert tier.get([block_key(0)], [empty_slot()]) == [Outcome.UNAVAILABLE]
    library.awake.set()


def test_long_calls_say_that_nobody_answers() -> None:
    library = SleepyLibrary()
    with RemoteServer(library, "tests", _CONFIG) as server:
        library.awake.clear()
        with pytest.raises(StoreIOError, match="no answer within"):
            server.ask_exists(["key"], 0.2)
        assert not server.is_reachable(0.1)
        library.awake.set()
