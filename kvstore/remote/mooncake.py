# SPDX-License-Identifier: Apache-2.0
"""Transport to a Mooncake Store (FAST '25, arXiv 2407.00079): registered memory, batched, replicated.

The library's calls heed no deadline: a hung peer holds them for 30 s, a lost master for 90 s with Python's lock in
hand, and a process that ends meanwhile crashes. So each link has a process of its own, which is killed when it is
late; values lie in memory that both share.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from kvstore.errors import ConfigError, StoreIOError
from kvstore.extras import missing_dependency
from kvstore.remote.transport import Link, Memory, Span
from kvstore.tiers.base import Outcome

# Error codes of the store (its types.h).
_FULL = (-200, -10)
_TOO_SMALL = -600
_NO_SUCH_KEY = -704
_IS_THERE_ALREADY = -705
_NOT_READY = -703

_JOIN_S = 15.0
_LEAVE_S = 0.5
_MARK_NBYTES = 64
_WORKER = Path(__file__).with_name("mooncake_worker.py")


@dataclass(frozen=True, slots=True)
class MooncakeCluster:
    """How to join a cluster.

    Args:
        host: of the master.
        port: of the master.
        local_host: address of this machine that the others reach.
        replicas: copies of every value, on different machines.
        protocol: `tcp` or `rdma`.
        devices: RDMA devices, comma-separated; empty for all.

    Raises:
        ConfigError: another protocol.
    """

    host: str
    port: int = 50051
    local_host: str = "127.0.0.1"
    replicas: int = 1
    protocol: str = "tcp"
    devices: str = ""

    def __post_init__(self) -> None:
        if self.protocol not in ("tcp", "rdma"):
            raise ConfigError(f"{self}: protocol {self.protocol!r}; use tcp or rdma")

    def __str__(self) -> str:
        return f"mooncake://{self.host}:{self.port}"


class _SharedMemory(mmap.mmap):
    """Memory that a worker maps, too; `descriptor` is how."""

    descriptor: int


class MooncakeTransport:
    """Starts workers, one a link.

    Args:
        cluster: the cluster.

    Raises:
        MissingDependencyError: mooncake is not installed.
    """

    def __init__(self, cluster: MooncakeCluster) -> None:
        if find_spec("mooncake") is None:
            raise missing_dependency("mooncake", "the remote tier over Mooncake")
        self._cluster = cluster

    @property
    def place(self) -> str:
        """Where the master is."""
        return str(self._cluster)

    def allocate(self, nbytes: int) -> Memory:
        """Memory that a worker can share."""
        descriptor = os.memfd_create("kvstore-remote", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, nbytes)
            memory = _SharedMemory(descriptor, nbytes)
        except BaseException:
            os.close(descriptor)
            raise
        memory.descriptor = descriptor
        return memory

    def free(self, memory: Memory) -> None:
        """Unmapped when the last view of it is gone."""
        assert isinstance(memory, _SharedMemory), "it was allocated here"
        os.close(memory.descriptor)

    def connect(self, memory: Memory, deadline_s: float) -> Link:
        """Start a worker and have it join; that may take longer than an exchange."""
        assert isinstance(memory, _SharedMemory), "it was allocated here"
        return _MooncakeLink(self._cluster, memory, max(deadline_s, time.monotonic() + _JOIN_S))

    def close(self) -> None:
        """Nothing is shared."""


class _MooncakeLink:
    """See `Link`. An answer that is late ends the worker."""

    def __init__(self, cluster: MooncakeCluster, memory: _SharedMemory, deadline_s: float) -> None:
        self._cluster = cluster
        self._memory = memoryview(memory)
        try:  # a child takes a second to find out
            left_s = min(deadline_s - time.monotonic(), _JOIN_S)
            socket.create_connection((cluster.host, cluster.port), left_s).close()
            self._socket, theirs = socket.socketpair()
        except (OSError, ValueError) as error:  # ValueError: an impossible host name
            raise StoreIOError(f"{cluster}: the master does not answer: {error}") from error
        settings = {
            "local_host": cluster.local_host,
            "master": f"{cluster.host}:{cluster.port}",
            "replicas": cluster.replicas,
            "protocol": cluster.protocol,
            "devices": cluster.devices,
            "nbytes": len(memory),
            "memory": memory.descriptor,
            "socket": theirs.fileno(),
        }
        with theirs:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), json.dumps(settings)],  # -P: this folder has modules of its own
                pass_fds=(memory.descriptor, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._lines: BinaryIO = self._socket.makefile("rb")
        try:
            (code,) = self._read(1, deadline_s)
            if code != 0:
                raise self._failed(code)
        except StoreIOError as error:
            self.close()
            if self._worker.returncode == 1:  # it ended by an exception
                raise StoreIOError(f"{cluster}: Mooncake does not load here; the system lacks libibverbs1?") from error
            raise

    def put(
        self, keys: Sequence[str], values: Sequence[Span], deadline_s: float, *, replace: bool = False
    ) -> list[Outcome]:
        """Create objects, or update them; a plain put keeps an object that is there."""
        once = dict(zip(keys, values, strict=True))
        codes = self._ask("replace" if replace else "put", list(once), deadline_s, list(once.values()))
        outcomes = {key: self._stored(code) for key, code in zip(once, codes, strict=True)}
        return [outcomes[key] for key in keys]

    def get(self, keys: Sequence[str], rooms: Sequence[Span], deadline_s: float) -> list[int | Outcome]:
        """Read objects straight into the shared memory.

        The client says that it has filled every room of a key that is asked for twice, and fills one: each is asked for
        once. Rooms are marked as empty before, so that what it has not filled is not taken for an answer.
        """
        once: dict[str, Span] = {}
        for key, room in zip(keys, rooms, strict=True):
            once.setdefault(key, room)
            mark = min(room.nbytes, _MARK_NBYTES)
            self._memory[room.offset : room.offset + mark] = bytes(mark)
        codes = self._ask("get", list(once), deadline_s, list(once.values()))
        found = {key: self._found(code, once[key].nbytes) for key, code in zip(once, codes, strict=True)}
        for key, room in zip(keys, rooms, strict=True):
            nbytes, source = found[key], once[key]
            if isinstance(nbytes, int) and room is not source:
                filled = self._memory[source.offset : source.offset + nbytes]
                self._memory[room.offset : room.offset + nbytes] = filled
        return [found[key] for key in keys]

    def exists(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        """Ask the master."""
        codes = self._ask("exists", keys, deadline_s)
        if any(code < 0 for code in codes):
            raise self._failed(min(codes))
        return [code == 1 for code in codes]

    def remove(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        """Remove objects, also those that were read a moment ago, which the master would keep for their readers."""
        codes = self._ask("remove", keys, deadline_s)
        for code in codes:
            if code not in (0, _NO_SUCH_KEY):
                raise self._failed(code)
        return [code == 0 for code in codes]

    def close(self) -> None:
        """Let the worker leave, or end it: when this returns, nobody writes to the memory."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._socket.close()
        try:
            self._worker.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        self._memory.release()

    def _ask(self, verb: str, keys: Sequence[str], deadline_s: float, spans: Sequence[Span] = ()) -> list[int]:
        if not keys:
            return []
        request = {
            "verb": verb,
            "keys": list(keys),
            "offsets": [span.offset for span in spans],
            "nbytes": [span.nbytes for span in spans],
        }
        try:
            self._socket.settimeout(max(deadline_s - time.monotonic(), 0.001))
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise StoreIOError(f"{self._cluster}: the worker is gone: {error}") from error
        return self._read(len(keys), deadline_s)

    def _read(self, count: int, deadline_s: float) -> list[int]:
        try:
            self._socket.settimeout(max(deadline_s - time.monotonic(), 0.001))
            codes = json.loads(self._lines.readline() or b"null")
        except (OSError, ValueError) as error:
            raise StoreIOError(f"{self._cluster}: no answer: {error}") from error
        if not isinstance(codes, list) or len(codes) != count or not all(isinstance(code, int) for code in codes):
            raise StoreIOError(f"{self._cluster}: the worker has ended, or is out of step")
        return codes

    def _stored(self, code: int) -> Outcome:
        if code in (0, _IS_THERE_ALREADY):
            return Outcome.STORED
        if code in _FULL:
            return Outcome.FULL
        raise self._failed(code)

    def _found(self, code: int, room_nbytes: int) -> int | Outcome:
        if code in (_NO_SUCH_KEY, _NOT_READY):
            return Outcome.MISS
        if code == _TOO_SMALL or code > room_nbytes:
            return Outcome.DAMAGED
        if code < 0:
            raise self._failed(code)
        return code

    def _failed(self, code: int) -> StoreIOError:
        return StoreIOError(f"{self._cluster}: the client failed with {code}")
