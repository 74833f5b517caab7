# SPDX-License-Identifier: Apache-2.0
"""Two processes, two stores, one server in between: encoded in one, answered from the other, bit for bit."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore
from kvstore.remote.address import open_server
from kvstore.remote.sharing.pull import pull
from kvstore.remote.sharing.push import push
from kvstore.store import Store
from tests.remote_servers import answers, mooncake_servers, redis_server, wait_for
from tests.store_blocks import HEADER, LAYOUT, empty_slot, make_blocks, open_store


def test_encode_in_one_process_answer_in_another(tmp_path: Path) -> None:
    said = []
    with redis_server(tmp_path) as redis, mooncake_servers(tmp_path) as mooncake:
        for action in ("encode", "answer"):
            command = [sys.executable, __file__, action, str(tmp_path / action), redis.address, mooncake.address]
            done = subprocess.run(
                command, env=_environment(), stdout=subprocess.PIPE, text=True, timeout=120, check=True
            )
            said += done.stdout.split("\n")
    assert len(said) == 6
    assert len(set(said) - {""}) == 1, "each store answers with the same bytes, from either server"
    assert said[0].startswith("12 blocks")


@pytest.mark.parametrize("start", [redis_server, mooncake_servers], ids=["redis", "mooncake"])
def test_servers_do_not_outlive_a_run_that_is_killed(tmp_path: Path, start: Any) -> None:
    with start(tmp_path):
        pass  # skips where it is not installed
    command = [sys.executable, __file__, "serve", str(tmp_path), start.__name__]
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        port = int(run.stdout.readline())
        assert answers(port)
        run.kill()
    wait_for(lambda: not answers(port), "the server to end")


def _environment() -> dict[str, str]:
    roots = [str(Path(kvstore.__file__).parents[1]), str(Path(__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}


def _serve(folder: str, start: str) -> None:
    """What a child does that is killed: start servers and wait."""
    servers: dict[str, Any] = {"redis_server": redis_server, "mooncake_servers": mooncake_servers}
    with servers[start](Path(folder)) as server:
        sys.stdout.write(f"{server.port}\n")
        sys.stdout.flush()
        signal.pause()


def _main(action: str, path: str, *addresses: str) -> None:
    """What a child does: encode and push, or pull and answer; prints what the blocks hold, per server."""
    for number, address in enumerate(addresses):
        folder = Path(path) / ("" if action == "encode" else str(number))
        with open_store(folder) as store, open_server(address) as server:
            if action == "encode":
                store.create_stream(HEADER)
                if number == 0:
                    store.append("lecture", make_blocks(12), {"is_complete": True})
                    store.flush()
                push(store, server, "lecture")
            else:
                pull(store, server, "lecture")
            sys.stdout.write(f"{_digest(store)}\n")


def _digest(store: Store) -> str:
    entries = store.manifest("lecture").entries
    slots = [empty_slot() for _ in entries]
    assert all(outcome.is_hit for outcome in store.get([entry.key for entry in entries], slots))
    digest = hashlib.sha256()
    for entry, slot in zip(entries, slots, strict=True):
        for part in (LAYOUT.keys(slot), LAYOUT.values(slot)):
            digest.update(part[:, :, : entry.num_tokens].contiguous().view(torch.uint8).numpy().tobytes())
    return f"{len(entries)} blocks {digest.hexdigest()}"


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(*sys.argv[2:])
    else:
        _main(*sys.argv[1:])
