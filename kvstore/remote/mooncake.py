# SPDX-License-Identifier: Apache-2.0
"""Transport to a Mooncake Store (FAST '25, arXiv 2407.00079): registered memory, batched, replicated. Imports mooncake.

Its calls cannot be given a deadline: a hung peer holds them for 30 to 90 seconds. The lanes above leave them behind.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.errors import ConfigError, StoreIOError
from kvstore.extras import missing_dependency
from kvstore.native import Arena
from kvstore.remote.transport import Link, Span
from kvstore.tiers.base import Outcome

# Error codes of the store (its types.h).
_FULL = (-200, -10)
_TOO_SMALL = -600
_NO_SUCH_KEY = -704
_IS_THERE_ALREADY = -705
_NOT_READY = -703

_LOCAL_BUFFER_NBYTES = 16 << 20
_LATE_WRITE_S = 120.0  # longer than any of its own limits
_MARK_NBYTES = 64
_METADATA = "P2PHANDSHAKE"
_PROBE = (
    "import sys; from mooncake.store import MooncakeDistributedStore as S; "
    "sys.exit(S().setup(sys.argv[1], sys.argv[2], 0, 1 << 20, sys.argv[3], sys.argv[4], sys.argv[5]) != 0)"
)


@dataclass(frozen=True, slots=True)
class MooncakeCluster:
    """How to join a cluster.

    Args:
        host: of the master.
        port: of the master.
        local_host: address of this machine that the others reach.
        replicas: copies of every value, on different machines.
        segment_nbytes: memory that this process lends to the cluster; 0 to store nothing for others.
        protocol: `tcp` or `rdma`.
        devices: RDMA devices, comma-separated; empty for all.
    """

    host: str
    port: int = 50051
    local_host: str = "127.0.0.1"
    replicas: int = 1
    segment_nbytes: int = 0
    protocol: str = "tcp"
    devices: str = ""

    def __str__(self) -> str:
        return f"mooncake://{self.host}:{self.port}"


class MooncakeTransport:
    """One client of a cluster, shared by all links; it joins with the first.

    Args:
        cluster: the cluster.

    Raises:
        MissingDependencyError: mooncake is not installed.
    """

    def __init__(self, cluster: MooncakeCluster) -> None:
        try:
            from mooncake.store import MooncakeDistributedStore, ReplicateConfig
        except ImportError as error:
            raise missing_dependency("mooncake", f"the remote tier over Mooncake ({error})") from error
        if cluster.protocol not in ("tcp", "rdma"):
            raise ConfigError(f"{cluster}: protocol {cluster.protocol!r}; use tcp or rdma")
        self._cluster = cluster
        self._client: Any = None
        self._new_client = MooncakeDistributedStore
        self._joining = threading.Lock()
        self._retired: deque[tuple[float, Arena]] = deque()
        self._config = ReplicateConfig()
        self._config.replica_num = cluster.replicas
        # Without it the client looks for an address in the local network, and finds none on a loopback-only host.
        os.environ.setdefault("MC_TCP_BIND_ADDRESS", cluster.local_host)

    @property
    def place(self) -> str:
        """Where the master is."""
        return str(self._cluster)

    def connect(self, memory: Arena, deadline_s: float) -> Link:
        """Join the cluster if that is still to be done, and register the memory."""
        with self._joining:
            if self._client is None:
                self._client = self._join(deadline_s)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        if self._client.register_buffer(address, memory.nbytes) != 0:
            raise StoreIOError(f"{self._cluster}: {memory.nbytes} bytes of memory cannot be registered")
        return _MooncakeLink(self._cluster, self._client, self._config, memory, address)

    def retire(self, memory: Arena) -> None:
        """Keep it while a transfer that the client has given up may yet end in it."""
        now_s = time.monotonic()
        with self._joining:
            self._retired.append((now_s + _LATE_WRITE_S, memory))
            while self._retired[0][0] < now_s:
                self._retired.popleft()[1].close()

    def close(self) -> None:
        """Leave the cluster."""
        with self._joining:
            if self._client is not None:
                self._client.close()
                self._client = None
            self._retired.clear()

    def _join(self, deadline_s: float) -> Any:
        """Join; tried by a child process first, since the library holds Python's lock for minutes when it fails."""
        cluster = self._cluster
        setup = (cluster.local_host, _METADATA, cluster.protocol, cluster.devices, f"{cluster.host}:{cluster.port}")
        try:
            left_s = deadline_s - time.monotonic()
            socket.create_connection((cluster.host, cluster.port), max(left_s, 0.001)).close()
            command = [sys.executable, "-c", _PROBE, *setup]
            # Joining takes longer than a call may: nobody waits for this one, it ends for the next call's sake.
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=10.0, check=False
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:  # ValueError: an impossible host name
            raise StoreIOError(f"{cluster}: the master does not answer: {error}") from error
        if done.returncode != 0:
            raise StoreIOError(f"{cluster}: joining the cluster failed; its log is on stderr of a process that has it")
        client = self._new_client()
        host, metadata, protocol, devices, master = setup
        result = client.setup(host, metadata, cluster.segment_nbytes, _LOCAL_BUFFER_NBYTES, protocol, devices, master)
        if result != 0:
            raise StoreIOError(f"{cluster}: joining the cluster failed with {result}")
        return client


class _MooncakeLink:
    """See `Link`. No call heeds its deadline."""

    def __init__(self, cluster: MooncakeCluster, client: Any, config: Any, memory: Arena, address: int) -> None:
        self._cluster = cluster
        self._client = client
        self._config = config
        self._memory = memoryview(memory)  # kept: its address is registered
        self._address = address

    def put(
        self, keys: Sequence[str], values: Sequence[Span], deadline_s: float, *, replace: bool = False
    ) -> list[Outcome]:
        """Create objects, or update them; a plain put keeps an object that is there."""
        store = self._client.batch_upsert_from if replace else self._client.batch_put_from
        once = dict(zip(keys, values, strict=True))
        codes = self._checked(store(list(once), *self._places(list(once.values())), self._config), len(once))
        outcomes = {key: self._stored(code) for key, code in zip(once, codes, strict=True)}
        return [outcomes[key] for key in keys]

    def get(self, keys: Sequence[str], rooms: Sequence[Span], deadline_s: float) -> list[int | Outcome]:
        """Read objects straight into the registered memory.

        The client says that it has filled every room of a key that is asked for twice, and fills one: each is asked for
        once. Rooms are marked as empty before, so that what it has not filled is not taken for an answer.
        """
        once: dict[str, Span] = {}
        for key, room in zip(keys, rooms, strict=True):
            once.setdefault(key, room)
            mark = min(room.nbytes, _MARK_NBYTES)
            self._memory[room.offset : room.offset + mark] = bytes(mark)
        codes = self._checked(self._client.batch_get_into(list(once), *self._places(list(once.values()))), len(once))
        found = {key: self._found(code, once[key].nbytes) for key, code in zip(once, codes, strict=True)}
        for key, room in zip(keys, rooms, strict=True):
            nbytes, source = found[key], once[key]
            if isinstance(nbytes, int) and room is not source:
                filled = self._memory[source.offset : source.offset + nbytes]
                self._memory[room.offset : room.offset + nbytes] = filled
        return [found[key] for key in keys]

    def exists(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        """Ask the master."""
        codes = self._checked(self._client.batch_is_exist(list(keys)), len(keys))
        if any(code < 0 for code in codes):
            raise self._failed(min(codes))
        return [code == 1 for code in codes]

    def remove(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        """Remove objects, also those that were read a moment ago, which the master would keep for their readers."""
        codes = self._checked(self._client.batch_remove(list(keys), True), len(keys))
        for code in codes:
            if code not in (0, _NO_SUCH_KEY):
                raise self._failed(code)
        return [code == 0 for code in codes]

    def close(self) -> None:
        """Forget the memory."""
        self._client.unregister_buffer(self._address)
        self._memory.release()

    def _places(self, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        return [self._address + span.offset for span in spans], [span.nbytes for span in spans]

    def _checked(self, codes: object, count: int) -> list[int]:
        if not isinstance(codes, list) or len(codes) != count:
            raise StoreIOError(f"{self._cluster}: the client answered a batch of {count} keys with {codes!r:.80}")
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
