# SPDX-License-Identifier: Apache-2.0
"""A server that lies: whatever it answers, calls end in time, memory stays small, and no slot is filled with it."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from kvstore.remote.address import open_server
from kvstore.remote.breaker import BreakerConfig
from kvstore.remote.lane import LaneConfig
from kvstore.remote.server import RemoteConfig
from kvstore.remote.tier import RemoteTier
from kvstore.stats import BreakerState
from kvstore.tiers.base import Outcome
from tests.store_blocks import LAYOUT, block_key, empty_slot, make_slot

_CONFIG = RemoteConfig(
    deadline_s=0.5, lanes=LaneConfig(deadline_s=0.4, patience_s=0.3), breaker=BreakerConfig(max_failures=1000)
)
_BAD = (Outcome.UNAVAILABLE, Outcome.TIMED_OUT, Outcome.DAMAGED, Outcome.MISS)


@contextmanager
def liar(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Address of a server that treats every connection with `answer` as soon as something is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        is_over = threading.Event()

        def talk(connection: socket.socket) -> None:
            with connection:
                connection.settimeout(10)
                try:
                    connection.recv(1 << 16)
                    answer(connection)
                    while not is_over.is_set() and connection.recv(1 << 16):
                        answer(connection)
                except OSError:
                    pass

        def serve() -> None:
            while not is_over.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}/tests"
        finally:
            is_over.set()
            listener.shutdown(socket.SHUT_RDWR)


def drip(connection: socket.socket) -> None:
    """A byte now and then, for ever."""
    for sign in itertools.chain(b"$20000\r\n", itertools.cycle(b"x")):
        connection.sendall(bytes([sign]))
        time.sleep(0.01)


def flood(connection: socket.socket) -> None:
    """Bytes without a line end."""
    while True:
        connection.sendall(b"+" * (1 << 16))


def hang_up_inside(connection: socket.socket) -> None:
    """A value that breaks off."""
    connection.sendall(b"$20000\r\nhello")
    connection.close()


ANSWERS: dict[str, Callable[[socket.socket], None]] = {
    "huge length": lambda c: c.sendall(b"$999999999999999\r\n"),
    "length beyond 64 bits": lambda c: c.sendall(b"$99999999999999999999999\r\n"),
    "negative length": lambda c: c.sendall(b"$-5\r\n"),
    "no number": lambda c: c.sendall(b"$abc\r\n"),
    "plus sign": lambda c: c.sendall(b"$+5\r\nhello\r\n"),
    "array": lambda c: c.sendall(b"*1000000000\r\n"),
    "nested arrays": lambda c: c.sendall(b"*1\r\n" * 10000),
    "status for a value": lambda c: c.sendall(b"+OK\r\n"),
    "wrong type": lambda c: c.sendall(b"-WRONGTYPE no\r\n"),
    "error": lambda c: c.sendall(b"-ERR no\r\n"),
    "not resp": lambda c: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "zeros": lambda c: c.sendall(bytes(100000)),
    "no end of the value": lambda c: c.sendall(b"$5\r\nhelloxx"),
    "empty value": lambda c: c.sendall(b"$0\r\n\r\n"),
    "short value": lambda c: c.sendall(b"$5\r\nhello\r\n"),
    "announced and not sent": lambda c: c.sendall(b"$20000\r\nhello"),
    "hang up": lambda c: c.close(),
    "hang up inside": hang_up_inside,
    "silence": lambda c: None,
    "drip": drip,
    "flood": flood,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_lies_end_in_time_and_touch_no_slot(name: str) -> None:
    with liar(ANSWERS[name]) as address, RemoteTier(open_server(address, _CONFIG), LAYOUT) as tier:
        slots = [empty_slot() for _ in range(3)]
        began_s = time.monotonic()
        outcomes = tier.get([block_key(number) for number in range(3)], slots)
        assert set(outcomes) <= set(_BAD), outcomes
        outcomes = tier.put([block_key(0)], [make_slot(0)], [40])
        assert set(outcomes) <= {Outcome.UNAVAILABLE, Outcome.TIMED_OUT}
        assert tier.exists([block_key(0)]) == [False]
        assert time.monotonic() - began_s < 30.0
        assert not any(torch.any(slot) for slot in slots)


def test_a_liar_is_left_alone_after_a_few_calls() -> None:
    config = RemoteConfig(deadline_s=0.5, breaker=BreakerConfig(max_failures=3, first_wait_s=60, max_wait_s=60))
    with (
        liar(lambda c: c.sendall(b"*3\r\n")) as address,
        RemoteTier(open_server(address, config), LAYOUT) as tier,
    ):
        for _ in range(3):
            tier.get([block_key(0)], [empty_slot()])
        assert tier.stats().breaker is BreakerState.OPEN
        began_s = time.monotonic()
        for _ in range(1000):
            assert tier.get([block_key(0)], [empty_slot()]) == [Outcome.UNAVAILABLE]
        assert time.monotonic() - began_s < 30.0
