# SPDX-License-Identifier: Apache-2.0
"""Readers beside a writer that evicts, removes and compacts at full speed: right bytes or a miss, and nothing grows."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

import kvstore
from kvstore.store import Access, FetchRequest, Outcome, Store
from kvstore.tiers.upkeep.compact import Compactor
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    LAYOUT,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    same_block,
)

NUM_READERS = 8
PLAIN = range(1000, 1080)
STREAM_BLOCKS = 20
BUDGET_NBYTES = (1 << 19) + (STREAM_BLOCKS + len(PLAIN) // 3) * EXTENT_NBYTES
READS_PER_LOOK = 50
"""What is noted of a look stays in memory, and must not look like a leak."""
MAX_GROWTH_NBYTES = 4 << 20
PATIENCE_S = 60


@cache
def expected(number: int) -> Tensor:
    return make_slot(number)


def read_for(path: Path, seed: int, seconds: float) -> dict[str, float]:
    """Read random blocks; returns what was met and what the process held in the first and in the last third."""
    rng = random.Random(seed)
    counts = dict.fromkeys(("hits", "misses", "damaged", "wrong"), 0)
    held: list[tuple[int, int]] = []
    num_reads, worst_s = 0, 0.0
    numbers = [*range(STREAM_BLOCKS), *PLAIN]
    for number in numbers:
        expected(number)  # its memory is not the store's
    with open_store(path, Access.READ) as store:
        began_s = time.monotonic()
        while time.monotonic() - began_s < seconds:
            chosen = [rng.choice(numbers) for _ in range(8)]
            first = rng.randrange(4)
            layers = range(first, first + 1) if first < 3 else None
            requests = [FetchRequest(block_key(number), empty_slot(), layers) for number in chosen]
            asked_s = time.monotonic()
            outcomes = store.fetch(requests).outcomes
            worst_s = max(worst_s, time.monotonic() - asked_s)
            for number, request, outcome in zip(chosen, requests, outcomes, strict=True):
                counts["hits"] += outcome.is_hit
                counts["misses"] += outcome is Outcome.MISS
                counts["damaged"] += outcome is Outcome.DAMAGED
                counts["wrong"] += outcome.is_hit and not same(request.slot, number, layers)
            num_reads += 1
            if num_reads % READS_PER_LOOK == 0:
                held.append((resident_nbytes(), sum(1 for _ in Path("/proc/self/fd").iterdir())))
    third = len(held) // 3
    return {
        **counts,
        "reads": num_reads,
        "worst_s": worst_s,
        "rss_before": median(nbytes for nbytes, _ in held[third : 2 * third]),
        "rss_after": median(nbytes for nbytes, _ in held[-third:]),
        "fds_before": held[third][1],
        "fds_after": held[-1][1],
    }


def same(slot: Tensor, number: int, layers: range | None) -> bool:
    if layers is None:
        return same_block(slot, expected(number))
    part = slice(layers.start, layers.stop)
    both = [(view(slot)[part], view(expected(number))[part]) for view in (LAYOUT.keys, LAYOUT.values)]
    return all((left.view(torch.int16) == right.view(torch.int16)).all() for left, right in both)


def resident_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def write_at_full_speed(store: Store, until_s: float) -> dict[str, int]:
    """Put, evict and remove, with a thread that compacts beside; returns how many blocks met what."""
    rng = random.Random(0)
    num_put = num_removed = 0
    with ThreadPoolExecutor(1) as thread:
        compacting = thread.submit(compact_until, store, until_s)
        while time.monotonic() < until_s:
            numbers = rng.sample(PLAIN, 16)  # half of them fit: others are evicted
            keys, slots = [block_key(number) for number in numbers], [expected(number) for number in numbers]
            assert Outcome.UNAVAILABLE not in store.put(keys, slots, [40] * 16)
            num_removed += sum(store.remove([block_key(number) for number in rng.sample(PLAIN, 4)]))
            num_put += 16
    evicted = store.stats().disk.evicted_blocks
    return {"put": num_put, "removed": num_removed, "evicted": evicted, "moved": compacting.result()}


def compact_until(store: Store, until_s: float) -> int:
    """Compact over and over; returns how many blocks moved."""
    moved = 0
    while time.monotonic() < until_s:
        moved += Compactor(store._disk, store._pool, 4 * EXTENT_NBYTES).run().moved_blocks
    return moved


def torture(path: Path, seconds: float) -> None:
    """Check what `NUM_READERS` processes meet in `seconds`."""
    with open_store(path, disk_nbytes=BUDGET_NBYTES) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(STREAM_BLOCKS), {})
        store.flush()
        roots = [str(Path(kvstore.__file__).parents[1]), str(Path(__file__).parents[1])]
        with subprocess.Popen(
            [sys.executable, __file__, str(path), str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        ) as readers:
            assert readers.stdout is not None
            assert readers.stdout.readline() == "ready\n"
            written = write_at_full_speed(store, time.monotonic() + seconds)
            output, _ = readers.communicate(timeout=PATIENCE_S)  # a reader that hangs ends the test here
        assert readers.returncode == 0, "a reader failed; its traceback is above"
        report = store.verify()
        assert report.is_clean, report
    results = [json.loads(line) for line in output.splitlines()]
    assert len(results) == NUM_READERS
    assert min(written.values()) > 0
    sys.stdout.write(f"{NUM_READERS} readers for {seconds:.0f} s; the writer: {written}\n")
    for result in results:
        sys.stdout.write(f"reader: {result}\n")  # pytest shows it with -s, or when the test fails
    sum_of = {name: sum(result[name] for result in results) for name in ("reads", "hits", "misses", "damaged", "wrong")}
    growth_kib = max(result["rss_after"] - result["rss_before"] for result in results) / 1024
    worst_s = max(result["worst_s"] for result in results)
    sys.stdout.write(f"all readers: {sum_of}, slowest read {worst_s:.2f} s, most growth {growth_kib:.0f} KiB\n")
    for result in results:
        assert result["wrong"] == result["damaged"] == 0
        assert min(result["hits"], result["misses"]) > 0
        assert result["worst_s"] < PATIENCE_S / 2
        assert result["fds_before"] == result["fds_after"]
        assert result["rss_after"] - result["rss_before"] < MAX_GROWTH_NBYTES


def test_readers_beside_a_busy_writer_get_right_bytes_or_none(tmp_path: Path) -> None:
    torture(tmp_path, 5)


@pytest.mark.slow
def test_readers_beside_a_busy_writer_get_right_bytes_or_none_for_five_minutes(tmp_path: Path) -> None:
    torture(tmp_path, 300)


def main(path: str, seconds: str) -> None:
    """Imports are slow and forks are fast: one process forks all readers."""
    children = []
    os.write(1, b"ready\n")
    for seed in range(NUM_READERS):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(1, (json.dumps(read_for(Path(path), seed, float(seconds))) + "\n").encode())
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))


if __name__ == "__main__":
    main(*sys.argv[1:])
