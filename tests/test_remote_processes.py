# SPDX-License-Identifier: Apache-2.0
"""Two processes, two stores, one server in between: encoded in one, answered from the other, bit for bit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

import kvstore
from kvstore.remote.address import open_server
from kvstore.remote.sharing.pull import pull
from kvstore.remote.sharing.push import push
from kvstore.store import Store
from tests.remote_servers import mooncake_servers, redis_server
from tests.store_blocks import HEADER, LAYOUT, empty_slot, make_blocks, open_store


def test_encode_in_one_process_answer_in_another(tmp_path: Path) -> None:
    roots = [str(Path(kvstore.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    said = []
    with redis_server(tmp_path) as redis, mooncake_servers(tmp_path) as mooncake:
        for action in ("encode", "answer"):
            command = [sys.executable, __file__, action, str(tmp_path / action), redis.address, mooncake.address]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
            said += done.stdout.split("\n")
    assert len(said) == 6
    assert len(set(said) - {""}) == 1, "each store answers with the same bytes, from either server"
    assert said[0].startswith("12 blocks")


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
    _main(*sys.argv[1:])
