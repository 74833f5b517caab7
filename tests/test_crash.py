# SPDX-License-Identifier: Apache-2.0
"""A writer is killed at random moments: what it acknowledged is there, and nothing half-written is visible."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import kvstore
from kvstore.config import Durability
from kvstore.store import Access, Outcome, Store
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    renumbered,
    requests_for,
    same_block,
)

BUDGET_NBYTES = 120 * EXTENT_NBYTES
PLAIN = range(1000, 1040)
SIDE = replace(HEADER, name="side")


def write_until_killed(path: Path, seed: int, durability: Durability) -> None:
    """Append, flush, put, evict, remove streams; tell the parent after each promise. Starts over when full."""
    rng = random.Random(seed)
    with open_store(path, disk_nbytes=BUDGET_NBYTES, durability=durability) as store:
        count = len(store.create_stream(HEADER).entries)
        say("open")
        while True:
            match rng.choice(("append", "append", "flush", "put", "remove", "side")):
                case "append":
                    added = rng.randint(1, 6)
                    store.append("lecture", make_blocks(added, count), {"next": count + added})
                    count += added
                case "flush":
                    store.flush()
                    say(f"flushed {count}")
                case "put":
                    number = rng.choice(PLAIN)
                    store.put([block_key(number)], [make_slot(number)], [40])
                    say("put")
                case "remove":
                    store.remove([block_key(rng.choice(PLAIN))])
                case "side":
                    write_side_stream(store)
            if count > 60:
                say("flushed 0")
                store.remove_stream("lecture")
                store.create_stream(HEADER)
                count = 0


def write_side_stream(store: Store) -> None:
    """A second stream that shares its blocks with the first, made and removed."""
    store.create_stream(SIDE)
    first = len(store.manifest("side").entries)
    store.append(
        "side", [renumbered(block, first + block.entry.index) for block in make_blocks(3)], {"next": first + 3}
    )
    store.flush()
    if first > 6:
        store.remove_stream("side")


def say(line: str) -> None:
    """Tell the parent, at once and in one piece."""
    os.write(1, (line + "\n").encode())


def serve_children() -> None:
    """Imports are slow and forks are fast: one process forks each writer that will be killed."""
    for line in sys.stdin:
        path, seed, durability = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            say(f"pid {os.getpid()}")
            try:
                write_until_killed(Path(path), int(seed), Durability(durability))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        say(f"dead {os.waitstatus_to_exitcode(status)}")


@dataclass(slots=True)
class Nursery:
    """The process that forks writers, as the test sees it."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def kill_a_writer(self, path: Path, seed: int, durability: Durability) -> int:
        """Start a writer, kill it at a moment that `seed` decides; returns how many entries it had promised."""
        rng = random.Random(seed)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\t{seed}\t{durability}\n")
        self.process.stdin.flush()
        pid = int(self.line().removeprefix("pid "))
        promised = 0
        for _ in range(rng.randint(1, 25)):
            line = self.line()
            assert not line.startswith("dead"), "the writer failed by itself; its traceback is above"
            if line.startswith("flushed"):
                promised = int(line.split()[1])
        time.sleep(rng.random() * 0.01)  # no event marks the middle of a write
        os.kill(pid, signal.SIGKILL)
        while not (line := self.line()).startswith("dead"):
            if line.startswith("flushed"):
                promised = int(line.split()[1])
        assert line == f"dead {-signal.SIGKILL}"
        return promised


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    roots = [str(Path(kvstore.__file__).parents[1]), str(Path(__file__).parents[1])]
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
    ) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


def check_after_the_crash(path: Path, promised: int) -> None:
    """The next writer finds a sound store with everything promised, byte for byte."""
    with open_store(path, Access.WRITE) as store:
        report = store.verify()
        assert report.is_clean, report
        entries = store.manifest("lecture").entries if promised or _has_lecture(store) else ()
        assert len(entries) >= promised
        if entries:
            assert store.manifest("lecture").cursor == {"next": len(entries)}
        requests = requests_for(make_blocks(len(entries)))
        assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
        for number, request in enumerate(requests):
            assert same_block(request.slot, make_slot(number)), f"block {number} holds other bytes"
        slots = [empty_slot() for _ in PLAIN]
        outcomes = store.get([block_key(number) for number in PLAIN], slots)
        assert Outcome.DAMAGED not in outcomes
        for number, slot, outcome in zip(PLAIN, slots, outcomes, strict=True):
            assert not outcome.is_hit or same_block(slot, make_slot(number)), f"block {number} holds other bytes"


def _has_lecture(store: Store) -> bool:
    return any(header.name == "lecture" for header in store.streams())


def kill_and_check(path: Path, nursery: Nursery, durability: Durability, iterations: int) -> None:
    first = int.from_bytes(os.urandom(4), "little")
    for seed in range(first, first + iterations):
        sys.stdout.write(f"seed {seed}\n")  # pytest shows it when the test fails
        check_after_the_crash(path, nursery.kill_a_writer(path, seed, durability))


@pytest.mark.parametrize("durability", list(Durability))
def test_a_killed_writer_leaves_what_it_promised(tmp_path: Path, nursery: Nursery, durability: Durability) -> None:
    kill_and_check(tmp_path, nursery, durability, iterations=6)


@pytest.mark.slow
def test_a_writer_killed_many_times_leaves_what_it_promised(tmp_path: Path, nursery: Nursery) -> None:
    kill_and_check(tmp_path, nursery, Durability.COMMIT, iterations=200)


if __name__ == "__main__":
    serve_children()
