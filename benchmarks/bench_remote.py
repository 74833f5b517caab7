# SPDX-License-Identifier: Apache-2.0
"""The remote tier over servers on loopback: batches put and got, against as many bytes over a plain socket."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness import Report, alternate, check, options
from kvstore.codec import Profile
from kvstore.layout import BlockLayout
from kvstore.remote.address import open_server
from kvstore.remote.envelope import ENVELOPE_NBYTES
from kvstore.remote.lane import Lane, LaneConfig
from kvstore.remote.server import RemoteConfig, RemoteServer
from kvstore.remote.tier import RemoteTier
from kvstore.spec import ModelSpec, chain_key
from kvstore.store import Outcome

sys.path.append(str(Path(__file__).parents[1]))

from tests.remote_servers import mooncake_servers, redis_server

BATCH = 8
SPEC = ModelSpec(16, 2, 64, 64, "bfloat16", "pre", "bench", "{}", "0")
NUM_TOKENS = (8, 128, 512)
"""Blocks of 64 KiB, 1 MiB and 4 MiB."""
PATIENT = RemoteConfig(deadline_s=60.0, lanes=LaneConfig(deadline_s=60.0, patience_s=30.0))


def serve_plainly(listener: socket.socket) -> None:
    """Take or give as many bytes as eight bytes ask for (negative: give), for ever."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_talk, args=(connection,), daemon=True).start()


def _talk(connection: socket.socket) -> None:
    memory = memoryview(bytearray(BATCH * 5 << 20))
    with connection, suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := connection.recv(8, socket.MSG_WAITALL):
            nbytes = int.from_bytes(request, "little", signed=True)
            if nbytes < 0:
                connection.sendall(memory[:-nbytes])
            else:
                _fill(connection, memory[:nbytes])
                connection.sendall(b"!")


def _fill(connection: socket.socket, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        done += connection.recv_into(memory[done:])


class Plain:
    """A socket to another process that takes and gives bytes and does nothing else: the limit."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._memory = memoryview(bytearray(os.urandom(1 << 20) * (BATCH * 5)))

    def put(self, nbytes: int) -> None:
        """Send bytes and wait until they are there."""
        self._socket.sendall(nbytes.to_bytes(8, "little", signed=True))
        self._socket.sendall(self._memory[:nbytes])
        check(self._socket.recv(1) == b"!", "the plain server answers")

    def get(self, nbytes: int) -> None:
        """Receive bytes."""
        self._socket.sendall((-nbytes).to_bytes(8, "little", signed=True))
        _fill(self._socket, self._memory[:nbytes])


@contextmanager
def plain_server() -> Iterator[Plain]:
    """A plain server in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = get_context("fork").Process(target=serve_plainly, args=(listener,), daemon=True)
        process.start()
        try:
            yield Plain(listener.getsockname()[1])
        finally:
            process.kill()
            process.join()


def bench_link(report: Report, plain: Plain, server: RemoteServer, nbytes: int, **case: Any) -> None:
    """Values between the server and a lane's memory, without coding: what the protocol and the server cost."""
    numbers = count()

    def bench(lane: Lane) -> None:
        rooms = lane.rooms(BATCH, nbytes)
        lane.memory[:] = os.urandom(1 << 16) * (len(lane.memory) >> 16) + bytes(len(lane.memory) & 0xFFFF)
        sent = [bytes(lane.part(room)) for room in rooms]
        keys = [f"bench:{nbytes}:{number}" for number in range(BATCH)]
        fresh: list[str] = []

        def put() -> None:
            fresh[:] = [f"bench:{nbytes}:{next(numbers)}:put" for _ in range(BATCH)]
            stored = lane.ask(lambda link, until_s: link.put(fresh, rooms, until_s))
            check(set(stored) == {Outcome.STORED}, f"a put ended with {stored}")

        def get() -> None:
            found = lane.ask(lambda link, until_s: link.get(keys, rooms, until_s))
            check(found == [nbytes] * BATCH, f"a get ended with {found}")

        def clear() -> None:
            if fresh:
                lane.ask(lambda link, until_s: link.remove(fresh, until_s))
                fresh.clear()

        lane.ask(lambda link, until_s: link.put(keys, rooms, until_s))
        lane.memory[:] = bytes(len(lane.memory))
        get()
        check([bytes(lane.part(room)) for room in rooms] == sent, "what was got is what was put")
        total = BATCH * nbytes
        puts = alternate({"socket": lambda: plain.put(total), "link": put}, clear)
        gets = alternate({"socket": lambda: plain.get(total), "link": get})
        clear()
        lane.ask(lambda link, until_s: link.remove(keys, until_s))
        for metric, found in (("put", puts), ("get", gets)):
            report.rate(metric, total / 1e9, "GB/s", ("link", found["link"]), ("socket", found["socket"]), **case)

    server.lanes.call(bench, 300.0)


def bench_tier(report: Report, plain: Plain, server: RemoteServer, layout: BlockLayout, **case: Any) -> None:
    """Blocks between slots and the server, checked and coded as `raw`: what the whole tier costs."""
    tier = RemoteTier(server, layout, Profile.RAW)
    numbers = count()
    slots = [torch.randint(0, 256, (layout.slot_nbytes,), dtype=torch.uint8) for _ in range(BATCH)]
    targets = [torch.empty_like(slot) for slot in slots]
    tokens = [layout.block_tokens] * BATCH
    keys = [chain_key(None, f"{layout.block_tokens} {number}".encode(), "bench") for number in range(BATCH)]
    fresh: list[Any] = []

    def put() -> None:
        fresh[:] = [chain_key(None, f"put {next(numbers)}".encode(), "bench") for _ in range(BATCH)]
        outcomes = tier.put(fresh, slots, tokens)
        check(set(outcomes) == {Outcome.STORED}, f"a put ended with {outcomes}")

    def get() -> None:
        outcomes = tier.get(keys, targets)
        check(set(outcomes) == {Outcome.REMOTE}, f"a get ended with {outcomes}")

    def clear() -> None:
        if fresh:
            tier.remove(fresh)
            fresh.clear()

    tier.put(keys, slots, tokens)
    get()
    check(all(torch.equal(a, b) for a, b in zip(slots, targets, strict=True)), "what was got is what was put")
    total = BATCH * layout.slot_nbytes
    puts = alternate({"socket": lambda: plain.put(total), "tier": put}, clear)
    gets = alternate({"socket": lambda: plain.get(total), "tier": get})
    clear()
    tier.remove(keys)
    for metric, found in (("put", puts), ("get", gets)):
        report.rate(metric, total / 1e9, "GB/s of raw KV", ("tier", found["tier"]), ("socket", found["socket"]), **case)


def main() -> None:
    """Measure with the servers that are installed."""
    settings = options("remote", __doc__)
    report = Report(settings, {"batch": BATCH})
    with ExitStack() as stack:
        plain = stack.enter_context(plain_server())
        addresses: dict[str, str] = {}
        if shutil.which("redis-server"):
            redis = stack.enter_context(redis_server(Path(stack.enter_context(TemporaryDirectory()))))
            addresses["redis, TCP"] = redis.address
            addresses["redis, Unix socket"] = f"redis+unix://{redis.socket}?namespace=bench"
        if find_spec("mooncake"):
            folder = Path(stack.enter_context(TemporaryDirectory()))
            addresses["mooncake, TCP"] = stack.enter_context(mooncake_servers(folder, 512 << 20)).address
        for name, address in addresses.items():
            with open_server(address, PATIENT) as server:
                check(server.is_reachable(60.0), f"{address} answers")
                for num_tokens in NUM_TOKENS[: 2 if settings.quick else 3]:
                    layout = BlockLayout(SPEC, num_tokens)
                    case = {"through": name, "value_nbytes": layout.slot_nbytes}
                    bench_link(report, plain, server, layout.slot_nbytes + ENVELOPE_NBYTES, **case)
                    bench_tier(report, plain, server, layout, **case)
    report.write()


if __name__ == "__main__":
    main()
