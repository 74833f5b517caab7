# SPDX-License-Identifier: Apache-2.0
"""A writer is killed at random moments: what it acknowledged is there, bit for bit, and no byte is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import kvstore
from kvstore.config import Durability
from kvstore.store import Access, FetchRequest, Outcome, Store
from kvstore.tiers.upkeep.compact import Compactor
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    renumbered,
    same_block,
)

BUDGET_NBYTES = (1 << 19) + 100 * EXTENT_NBYTES
PLAIN = range(1000, 1060)
SIDE = replace(HEADER, name="side")
ACTIONS = ("append", "append", "flush", "put", "put many", "remove", "side", "compact")


def write_until_killed(path: Path, seed: int, durability: Durability) -> None:
    """Append, flush, put, evict, remove, compact; tell the parent after each promise. Starts over when full."""
    rng = random.Random(seed)
    with open_store(path, disk_nbytes=BUDGET_NBYTES, durability=durability) as store:
        count = len(store.create_stream(HEADER).entries)
        say("open")
        if seed % 2:
            threading.Thread(target=compact_for_ever, args=(store, rng.randint(1, 1 << 20)), daemon=True).start()
        while True:
            match rng.choice(ACTIONS):
                case "append":
                    added = rng.randint(1, 6)
                    store.append("lecture", make_blocks(added, count), {"next": count + added})
                    count += added
                    if durability is Durability.SYNC:
                        say(f"flushed {count}")
                case "flush":
                    store.flush()
                    say(f"flushed {count}")
                case "put":
                    put(store, [rng.choice(PLAIN)])
                case "put many":  # more than there is room for beside the streams: others are evicted
                    put(store, rng.sample(PLAIN, 40))
                case "remove":
                    store.remove([block_key(number) for number in rng.sample(PLAIN, rng.randint(1, 10))])
                case "side":
                    write_side_stream(store)
                case "compact":
                    Compactor(store._disk, store._pool, rng.choice((1, 4 * EXTENT_NBYTES, 1 << 24))).step()
                    say("compacted")
            if count > 50:
                say("flushed 0")
                store.remove_stream("lecture")
                store.create_stream(HEADER)
                count = 0


def put(store: Store, numbers: list[int]) -> None:
    """Store plain blocks; they may be evicted at once, so nothing is promised of them but their bytes."""
    keys, slots = [block_key(number) for number in numbers], [make_slot(number) for number in numbers]
    if Outcome.UNAVAILABLE in store.put(keys, slots, [40] * len(numbers)):
        raise AssertionError("a put failed on a sound disk")
    say("put")


def compact_for_ever(store: Store, step_nbytes: int) -> None:
    """Compact beside the writer; the process ends, and the test fails, when that cannot go on."""
    try:
        while True:
            Compactor(store._disk, store._pool, step_nbytes).run()
            time.sleep(0.001)
    finally:
        traceback.print_exc()
        os._exit(1)


def write_side_stream(store: Store) -> None:
    """A second stream that shares its blocks with the first, made and removed."""
    store.create_stream(SIDE)
    first = len(store.manifest("side").entries)
    store.append(
        "side", [renumbered(block, first + block.entry.index) for block in make_blocks(3)], {"next": first + 3}
    )
    store.flush()
    say(f"side {first + 3}")
    if first > 6:
        say("side 0")
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
class Promises:
    """Entries that must be there of each stream: what earlier writers left, and what this one acknowledged."""

    lecture: int = 0
    side: int = 0
    num_heard: int = 0

    def hear(self, line: str) -> None:
        self.num_heard += 1
        word, _, number = line.partition(" ")
        if word == "flushed":
            self.lecture = int(number)
        elif word == "side":
            self.side = int(number)


@dataclass(slots=True)
class Nursery:
    """The process that forks writers, as the test sees it."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def kill_a_writer(self, path: Path, seed: int, durability: Durability, promises: Promises) -> None:
        """Start a writer, kill it at a moment that `seed` decides; `promises` gains what it promised."""
        rng = random.Random(seed)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\t{seed}\t{durability}\n")
        self.process.stdin.flush()
        pid = int(self.line().removeprefix("pid "))
        for _ in range(rng.randint(0, 25)):
            line = self.line()
            assert not line.startswith("dead"), "the writer failed by itself; its traceback is above"
            promises.hear(line)
        time.sleep(rng.random() * 0.02)  # no event marks the middle of a write
        os.kill(pid, signal.SIGKILL)
        while not (line := self.line()).startswith("dead"):
            promises.hear(line)
        assert line == f"dead {-signal.SIGKILL}", "the writer failed by itself; its traceback is above"


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


def check_after_the_crash(path: Path, promises: Promises) -> int:
    """The next writer finds a sound store with everything promised, byte for byte, and no byte of it lost.

    What it finds is committed, and so promised from then on. Returns how many blocks were compared.
    """
    with open_store(path, Access.WRITE) as store:
        report = store.verify()
        assert report.is_clean, report
        assert report.account is not None
        assert (report.account.unaccounted_nbytes, report.account.orphan_nbytes) == (0, 0)
        assert report.account.file_nbytes == sum(file.stat().st_size for file in (path / "extents").iterdir())
        names = {header.name for header in store.streams()}
        lecture, side = ("lecture" if "lecture" in names else None), ("side" if "side" in names else None)
        promises.lecture = check_stream(store, lecture, promises.lecture, lambda index: index)
        promises.side = check_stream(store, side, promises.side, lambda index: index % 3)
        slots = [empty_slot() for _ in PLAIN]
        outcomes = store.get([block_key(number) for number in PLAIN], slots)
        assert Outcome.DAMAGED not in outcomes
        for number, slot, outcome in zip(PLAIN, slots, outcomes, strict=True):
            assert not outcome.is_hit or same_block(slot, make_slot(number)), f"block {number} holds other bytes"
    return promises.lecture + promises.side + sum(outcome.is_hit for outcome in outcomes)


def check_stream(store: Store, name: str | None, promised: int, number_of: Callable[[int], int]) -> int:
    """A stream holds at least what was promised, and all it holds reads back bit for bit; returns how many entries."""
    manifest = store.manifest(name) if name is not None else None
    entries = manifest.entries if manifest is not None else ()
    assert len(entries) >= promised, name
    if manifest is not None and entries:
        assert manifest.cursor == {"next": len(entries)}
    requests = [FetchRequest(entry.key, empty_slot()) for entry in entries]
    assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
    for index, request in enumerate(requests):
        assert same_block(request.slot, make_slot(number_of(index))), f"block {index} of {name} holds other bytes"
    return len(entries)


def kill_and_check(path: Path, nursery: Nursery, durability: Durability, iterations: int) -> None:
    first = int.from_bytes(os.urandom(4), "little")
    promises, num_compared, began_s = Promises(), 0, time.monotonic()
    for seed in range(first, first + iterations):
        try:
            nursery.kill_a_writer(path, seed, durability, promises)
            num_compared += check_after_the_crash(path, promises)
        except BaseException:
            sys.stdout.write(f"kill number {seed - first + 1}, seed {seed}, after {promises}\n")
            raise
    sys.stdout.write(
        f"{iterations} kills at durability {durability} in {time.monotonic() - began_s:.0f} s: "
        f"{promises.num_heard} acknowledgements heard, {num_compared} blocks compared, none lost, none wrong\n"
    )


@pytest.mark.parametrize("durability", list(Durability))
def test_a_killed_writer_leaves_what_it_promised(tmp_path: Path, nursery: Nursery, durability: Durability) -> None:
    kill_and_check(tmp_path, nursery, durability, iterations=8)


@pytest.mark.slow
def test_a_writer_killed_500_times_leaves_what_it_promised(tmp_path: Path, nursery: Nursery) -> None:
    kill_and_check(tmp_path, nursery, Durability.COMMIT, iterations=500)


if __name__ == "__main__":
    serve_children()
