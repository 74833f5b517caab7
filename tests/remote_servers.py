# SPDX-License-Identifier: Apache-2.0
"""Real servers on loopback for tests of the remote tier: redis-server, and a Mooncake master with a storage client.

Run as a script it is the storage client. All end with the process that started them, also when that is killed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from kvstore.remote.resp import Endpoint, RespConnection

_PATIENCE_S = 60.0
_BOUND = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
"""Runs a program that gets SIGKILL when whoever started it ends (PR_SET_PDEATHSIG)."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(holds: Callable[[], bool], what: str) -> None:
    """Wait until something holds; fails after a minute."""
    give_up_s = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up_s, f"waited in vain for {what}"
        time.sleep(0.02)


def answers(port: int) -> bool:
    """True when somebody accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def start_bound(command: Sequence[str], log: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start a server that does not outlive this process."""
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", _BOUND, *command], stdout=log, stderr=log)


class RedisServer:
    """redis-server in memory only, on TCP and on a Unix socket.

    Args:
        folder: for its log and socket.
        options: more arguments of redis-server.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed; `make servers` gets it")
        self.port = free_port()
        self.socket = folder / "redis.sock"
        self._log = folder / "redis.log"
        self._command = [program, "--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"]
        self._command += ["--unixsocket", str(self.socket), "--logfile", str(self._log), "--dir", str(folder), *options]
        self.start()

    @property
    def address(self) -> str:
        """URL of a namespace on it."""
        return f"redis://127.0.0.1:{self.port}/tests"

    def start(self) -> None:
        """Start it, again after `kill`."""
        self.process = start_bound(self._command, subprocess.DEVNULL)
        with ended_unless_started(self.kill):
            wait_for(lambda: answers(self.port), f"redis-server, see {self._log}")

    def kill(self) -> None:
        """End it at once; what it held is lost."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Hang it: connections stay, answers do not come."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undo `stop`."""
        self.process.send_signal(signal.SIGCONT)

    def command(self, *words: str | bytes) -> object:
        """Run a command whose answer is a number or a status."""
        connection = RespConnection(Endpoint("127.0.0.1", self.port), time.monotonic() + 10)
        try:
            connection.send([[w.encode() if isinstance(w, str) else w for w in words]], time.monotonic() + 10)
            return connection.read_line()
        finally:
            connection.close()

    def value(self, key: str) -> bytes:
        """The value of a key."""
        connection = RespConnection(Endpoint("127.0.0.1", self.port), time.monotonic() + 10)
        try:
            connection.send([[b"GET", key.encode()]], time.monotonic() + 10)
            room = bytearray(64 << 20)
            nbytes = connection.read_value(memoryview(room))
            assert isinstance(nbytes, int), nbytes
            return bytes(room[:nbytes])
        finally:
            connection.close()


@contextmanager
def ended_unless_started(end: Callable[[], None]) -> Iterator[None]:
    """End what was started when what shows that it works fails: nobody else will."""
    try:
        yield
    except BaseException:
        end()
        raise


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    """A redis-server for the length of a `with` block."""
    server = RedisServer(folder, *options)
    try:
        yield server
    finally:
        server.kill()


def need_mooncake() -> None:
    """Skip the test where Mooncake is not installed, or does not load for want of a library."""
    reason = "Mooncake is not here; pip install 'tiered-kvstore[remote]', and `make servers` for its libraries"
    pytest.importorskip("mooncake.store", reason=reason, exc_type=ImportError)


class MooncakeServers:
    """A Mooncake master, and a client in a process of its own that stores for others.

    Args:
        folder: for logs.
        segment_nbytes: memory of the storage client.
    """

    def __init__(self, folder: Path, segment_nbytes: int) -> None:
        need_mooncake()
        self.port = free_port()
        self._folder = folder
        self._segment_nbytes = segment_nbytes
        self.start_master()
        with ended_unless_started(self.kill_master):
            self.start_client()

    @property
    def address(self) -> str:
        """URL of a namespace on it."""
        return f"mooncake://127.0.0.1:{self.port}/tests"

    def start_master(self) -> None:
        """Start the master, again after it was killed."""
        program = str(Path(sys.executable).parent / "mooncake_master")
        command = [program, "--rpc_address=127.0.0.1", f"--rpc_port={self.port}", "--enable_metric_reporting=false"]
        command += [f"--metrics_port={free_port()}", "--metrics_host=127.0.0.1", "--client_ttl=8"]
        with (self._folder / "master.log").open("ab") as log:
            self.master = start_bound(command, log)
        with ended_unless_started(self.kill_master):
            wait_for(lambda: answers(self.port), f"mooncake_master, see {self._folder}")

    def start_client(self) -> None:
        """Start the storage client, again after it was killed."""
        command = [sys.executable, __file__, str(self.port), str(self._segment_nbytes)]
        with (self._folder / "client.log").open("ab") as log:
            environment = {**os.environ, "MC_TCP_BIND_ADDRESS": "127.0.0.1"}
            self.client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        with ended_unless_started(self.kill_client):
            assert self.client.stdout is not None
            said = self.client.stdout.readline()
            assert said == b"ready\n", f"the storage client said {said!r}, see {self._folder}"

    def close(self) -> None:
        """End both."""
        self.kill_client()
        self.kill_master()

    def kill_master(self) -> None:
        """End the master at once: what it knew is lost."""
        self.master.kill()
        self.master.wait()

    def stop_client(self) -> None:
        """Hang the storage client: connections stay, answers do not come."""
        self.client.send_signal(signal.SIGSTOP)

    def kill_client(self) -> None:
        """End the storage client at once: what it held is lost."""
        self.client.kill()
        self.client.wait()
        assert self.client.stdout is not None
        self.client.stdout.close()


@contextmanager
def mooncake_servers(folder: Path, segment_nbytes: int = 128 << 20) -> Iterator[MooncakeServers]:
    """A master and a storage client for the length of a `with` block."""
    servers = MooncakeServers(folder, segment_nbytes)
    try:
        yield servers
    finally:
        servers.close()


def _store_for_others(port: str, segment_nbytes: str) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # see _BOUND
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    result = client.setup("127.0.0.1", "P2PHANDSHAKE", int(segment_nbytes), 16 << 20, "tcp", "", f"127.0.0.1:{port}")
    os.write(1, b"ready\n" if result == 0 else f"failed with {result}\n".encode())
    signal.pause()


if __name__ == "__main__":
    _store_for_others(*sys.argv[1:])
