# SPDX-License-Identifier: Apache-2.0
"""Appending while the disk is slow: an engine's step, and whole blocks, on a disk of 20 MB/s and on an idle one."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from harness import Report, check, options
from kvstore.config import Access, Durability
from kvstore.layout import BlockLayout
from kvstore.retrieval.registry import policy_named
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.spec import ModelSpec, chain_key
from kvstore.store import Entry, NewBlock, Profile, Store, StreamHeader
from machine import file_system
from slow_disk import SlowDisk

SLOW_RATE = 20_000_000
WIDE = BlockLayout(ModelSpec(16, 16, 128, 128, "bfloat16", "pre", "bench", "{}", "0"), 16)
"""2 MiB a block, 128 KiB a token: a step of an engine then makes more bytes than the slow disk takes meanwhile."""
NARROW = BlockLayout(ModelSpec(8, 2, 64, 64, "bfloat16", "pre", "bench", "{}", "0"), 32)
"""128 KiB a block."""
HOST_NBYTES = 256 << 20
QUANTILES = {"median": 0.5, "p99": 0.99, "p99.9": 0.999, "worst": 1.0}

Step = Callable[[], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare where the store goes."""
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where the scratch store is made")


def open_store(folder: Path, layout: BlockLayout) -> Store:
    """A store whose host tier holds `HOST_NBYTES` of blocks that wait for the disk."""
    return Store.open(
        folder,
        access=Access.WRITE,
        layout=layout,
        profile=Profile.RAW,
        host_nbytes=HOST_NBYTES,
        durability=Durability.COMMIT,
    )


def header(layout: BlockLayout, prefill: str) -> StreamHeader:
    """A new stream."""
    return StreamHeader("bench", layout.spec, layout.block_tokens, Profile.RAW, prefill, {}, 0.0)


def token_step(store: Store) -> Step:
    """One step of an engine: K and V of one token, in every layer; each 16th token completes a block."""
    config = SessionConfig(policy_named("streaming_llm"), window_tokens=64, sink_tokens=8, device_nbytes=96 << 20)
    stored = store.create_stream(header(WIDE, config.prefill)).header
    session = Session(store, stored, config, lambda vectors, positions: vectors, torch.device("cpu"))
    chance = torch.Generator().manual_seed(0)
    # As many tokens as in a block: of one alone, a block would shrink to nothing.
    keys, values = (torch.randn(16, 1, 16, 1, 128, generator=chance, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(1, 16, 1, 128, generator=chance, dtype=torch.bfloat16)

    def step() -> None:
        position = session.num_tokens
        positions, ids = torch.full((1, 1, 1), position), torch.tensor([position])
        for layer in range(WIDE.spec.num_layers):
            session.extend(layer, query, keys[position % 16], values[position % 16], positions, ids, 0.125)

    return step


def block_step(store: Store) -> Step:
    """One whole block through `Store.append`."""
    store.create_stream(header(NARROW, "bench"))
    chance = torch.Generator().manual_seed(1)
    slots = [torch.zeros(NARROW.slot_nbytes, dtype=torch.uint8) for _ in range(16)]
    for slot in slots:
        for plane in (NARROW.keys(slot), NARROW.values(slot)):
            plane.copy_(torch.randn(plane.shape, generator=chance))
    count = 0

    def step() -> None:
        nonlocal count
        key = chain_key(None, count.to_bytes(8, "little"), "bench")
        entry = Entry(count, key, NARROW.block_tokens, count * NARROW.block_tokens, 0.0, 0.0, 0)
        store.append("bench", [NewBlock(entry, slots[count % 16], b"")], {})
        count += 1

    return step


def bench_steps(
    report: Report, disk: SlowDisk, store: Store, kind: str, step: Step, num_steps: int, rounds: int
) -> None:
    """Time steps in rounds on either disk; no round appends more than the host tier holds."""
    samples: dict[str, list[float]] = {"idle disk": [], "20 MB/s": []}
    for _ in range(num_steps // 4):
        step()
    for _ in range(rounds):
        for what, times in samples.items():
            store.flush()
            disk.set(write_rate=SLOW_RATE if what == "20 MB/s" else 0)
            for _ in range(num_steps):
                began_s = time.perf_counter()
                step()
                times.append(time.perf_counter() - began_s)
            if what == "20 MB/s":
                check(store.stats().queued_blocks > 0, "the disk kept up: it was not slow")
            disk.set()
    store.flush()
    for name, share in QUANTILES.items():
        found = {what: sorted(times)[min(int(share * len(times)), len(times) - 1)] for what, times in samples.items()}
        report.value(
            f"append, {name}",
            "us",
            ("20 MB/s", found["20 MB/s"] * 1e6),
            ("idle disk", found["idle disk"] * 1e6),
            kind=kind,
            steps=rounds * num_steps,
        )


def bench_back_pressure(report: Report, disk: SlowDisk, store: Store, step: Step, seconds: float) -> None:
    """Append for longer than the host tier can take: from then on the producer is as fast as the disk."""
    store.flush()
    disk.set(write_rate=SLOW_RATE)
    while store.stats().queued_blocks < HOST_NBYTES // NARROW.slot_nbytes - 64:
        step()
    written = store.stats().disk.written_nbytes
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        step()
    rate = (store.stats().disk.written_nbytes - written) / (time.perf_counter() - began_s)
    disk.set()
    store.flush()
    case = {"kind": "block", "host_mib": HOST_NBYTES >> 20}
    report.value("append at the bound", "MB/s written", ("store", rate / 1e6), ("20 MB/s", SLOW_RATE / 1e6), **case)


def main() -> None:
    """Start over inside the slow disk, then measure."""
    settings = options("append", __doc__, add_options)
    if "SLOW_DISK_CONTROL" not in os.environ:
        with TemporaryDirectory(dir=settings.folder) as scratch:
            folder = Path(scratch) / "disk"
            folder.mkdir()
            environment = {**os.environ, **SlowDisk(Path(scratch), folder).environment}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    folder = Path(os.environ["SLOW_DISK_FOLDER"])
    disk = SlowDisk(folder.parent, folder)
    report = Report(settings, {"place": file_system(folder), "slowed_by": "LD_PRELOAD, writes of all threads together"})
    gc.freeze()  # what the libraries hold is not looked through again while steps are timed
    rounds = 2 if settings.quick else 8
    kinds = (("token", WIDE, token_step, 1800), ("block", NARROW, block_step, 1800))
    for kind, layout, make, num_steps in kinds:
        with open_store(folder / kind, layout) as store:
            step = make(store)
            bench_steps(report, disk, store, kind, step, num_steps, rounds)
            if kind == "block":
                bench_back_pressure(report, disk, store, step, 4.0 if settings.quick else 15.0)
    report.write()


if __name__ == "__main__":
    main()
