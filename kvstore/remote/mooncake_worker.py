# SPDX-License-Identifier: Apache-2.0
"""The process that is a client of a Mooncake Store for one link: a script that imports nothing of kvstore.

Its argument is JSON: how to join, and the descriptors of a socket and of shared memory. Requests and answers are
lines of JSON over the socket; values lie in the shared memory.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1
_METADATA = "P2PHANDSHAKE"
_LOCAL_BUFFER_NBYTES = 16 << 20


def main() -> None:
    """Join, say so, and serve until the other end hangs up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # in a call that hangs nobody sees a hang-up
    settings = json.loads(sys.argv[1])
    # Without it the client looks for an address in the local network, and finds none on a loopback-only host.
    os.environ.setdefault("MC_TCP_BIND_ADDRESS", settings["local_host"])
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig

    memory = mmap.mmap(settings["memory"], settings["nbytes"])
    address = ctypes.addressof((ctypes.c_char * settings["nbytes"]).from_buffer(memory))
    client = MooncakeDistributedStore()
    code = client.setup(
        settings["local_host"],
        _METADATA,
        0,
        _LOCAL_BUFFER_NBYTES,
        settings["protocol"],
        settings["devices"],
        settings["master"],
    )
    code = code or client.register_buffer(address, settings["nbytes"])
    config = ReplicateConfig()
    config.replica_num = settings["replicas"]
    with socket.socket(fileno=settings["socket"]) as connection, connection.makefile("rwb") as lines:
        _say(lines, [code])
        for line in lines if code == 0 else ():
            _say(lines, _answer(client, config, address, json.loads(line)))
    os._exit(0)  # the library's own clean-up may hang or crash


def _say(lines: Any, codes: list[int]) -> None:
    lines.write(json.dumps(codes).encode() + b"\n")
    lines.flush()


def _answer(client: Any, config: Any, address: int, request: dict[str, Any]) -> list[int]:
    verb, keys = request["verb"], request["keys"]
    if verb == "exists":
        return list(client.batch_is_exist(keys))
    if verb == "remove":
        return list(client.batch_remove(keys, True))
    places = [address + offset for offset in request["offsets"]], request["nbytes"]
    if verb == "get":
        return list(client.batch_get_into(keys, *places))
    store: Callable[..., list[int]] = client.batch_upsert_from if verb == "replace" else client.batch_put_from
    return list(store(keys, *places, config))


if __name__ == "__main__":
    main()
