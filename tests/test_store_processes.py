# SPDX-License-Identifier: Apache-2.0
"""Several processes on one store: one writer, any number of readers, forks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvstore
from kvstore.errors import BusyError, ConfigError
from kvstore.store import Access, Outcome
from tests.store_blocks import HEADER, block_key, empty_slot, make_blocks, make_slot, open_store, same_block

NUM_BLOCKS = 60


def start(*arguments: str) -> subprocess.Popen[str]:
    """Run this file as a child process."""
    roots = [str(Path(kvstore.__file__).parents[1]), str(Path(__file__).parents[1])]
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
    )


def say(line: str) -> None:
    """Tell the parent."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def read_while_it_grows(path: Path, seed: int) -> None:
    """Fetch random blocks of a growing stream until it is complete; every hit must hold the right bytes."""
    rng = random.Random(seed)
    num_hits = num_seen = 0
    is_complete = False
    with open_store(path, Access.READ) as store:
        say("ready")
        deadline_s = time.monotonic() + 60
        while not is_complete and time.monotonic() < deadline_s:
            manifest = store.manifest("lecture")
            assert len(manifest.entries) == manifest.cursor.get("next", 0), "manifest and cursor are of one commit"
            assert len(manifest.entries) >= num_seen, "a stream only grows"
            is_complete, num_seen = manifest.is_complete, len(manifest.entries)
            chosen = rng.sample(manifest.entries, min(5, num_seen))
            slots = [empty_slot() for _ in chosen]
            outcomes = store.get([entry.key for entry in chosen], slots)
            for entry, slot, outcome in zip(chosen, slots, outcomes, strict=True):
                assert outcome.is_hit, f"entry {entry.index}: {outcome}"
                assert same_block(slot, make_slot(entry.index)), f"entry {entry.index} holds other bytes"
                num_hits += 1
            # These come and go: each look must end as the right bytes or as a miss.
            slot = empty_slot()
            number = 1000 + rng.randrange(8)
            (outcome,) = store.get([block_key(number)], [slot])
            assert outcome in (Outcome.HOST, Outcome.DISK, Outcome.MISS), outcome
            assert not outcome.is_hit or same_block(slot, make_slot(number)), f"block {number} holds other bytes"
    say(json.dumps({"hits": num_hits, "seen": num_seen}))


def test_readers_see_a_growing_stream_and_never_wrong_bytes(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        readers = [start("read", str(tmp_path), str(seed)) for seed in (1, 2)]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
        for index in range(NUM_BLOCKS):
            store.append("lecture", make_blocks(1, index), {"next": index + 1, "is_complete": index == NUM_BLOCKS - 1})
            store.put([block_key(1000 + index % 8)], [make_slot(1000 + index % 8)], [40])
            store.remove([block_key(1000 + (index - 2) % 8)])
        store.flush()
        for reader in readers:
            output, _ = reader.communicate(timeout=60)
            assert reader.returncode == 0, "a reader met wrong bytes; its traceback is above"
            result = json.loads(output)
            assert result["seen"] == NUM_BLOCKS
            assert result["hits"] > 0
        assert store.verify().is_clean


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    with open_store(tmp_path):
        child = start("write", str(tmp_path))
        output, _ = child.communicate(timeout=60)
        assert f"process {os.getpid()}" in output


@pytest.mark.parametrize("access", list(Access))
def test_a_second_open_in_one_process_is_refused(tmp_path: Path, access: Access) -> None:
    with open_store(tmp_path), pytest.raises(BusyError):
        open_store(tmp_path, access)


def test_a_forked_child_is_told_to_open_its_own_and_does_no_harm(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([block_key(1)], [make_slot(1)], [40])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store.get([block_key(1)], [empty_slot()])
            except (BusyError, ConfigError):
                store.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.put([block_key(2)], [make_slot(2)], [40]) == [Outcome.STORED]
        assert store.verify().is_clean


def main(action: str, path: str, *rest: str) -> None:
    """What a child does."""
    if action == "read":
        read_while_it_grows(Path(path), int(rest[0]))
        return
    try:
        open_store(Path(path)).close()
        say("opened")
    except BusyError as error:
        say(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
