# SPDX-License-Identifier: Apache-2.0
"""Puts into a store that has been full for ten times its capacity, against puts into a fresh one; and its allocator."""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness import Report, alternate, check, options
from kvstore.codec import Profile
from kvstore.layout import BlockLayout
from kvstore.spec import ModelSpec, chain_key
from kvstore.store import Access, Durability, Outcome, Store
from kvstore.tiers.placing.free_space import FreeSpace
from machine import file_system

BATCH = 16
AGED = 10
"""Times its capacity that a store has written before it is measured."""


class Putting:
    """A scratch store that takes ever new blocks.

    Args:
        folder: the store.
        layout: of its blocks; full ones take `layout.slot_nbytes`.
        has_many_sizes: blocks of 1 to all tokens of the layout instead of full ones.
        capacity_nbytes: its budget, or where a fresh store starts afresh.
        is_fresh: whether it starts afresh there instead of evicting.
        durability: what a put survives.
    """

    def __init__(
        self,
        folder: Path,
        layout: BlockLayout,
        has_many_sizes: bool,
        capacity_nbytes: int,
        is_fresh: bool,
        durability: Durability,
    ) -> None:
        self._folder, self._layout, self._durability = folder, layout, durability
        self._capacity_nbytes, self._is_fresh = capacity_nbytes, is_fresh
        self._rng = random.Random(0)
        self._has_many_sizes = has_many_sizes
        noise = torch.Generator().manual_seed(0)
        self._slots = [
            torch.randint(0, 256, (layout.slot_nbytes,), dtype=torch.uint8, generator=noise) for _ in range(BATCH)
        ]
        self.num_put = 0
        self.written_nbytes = 0
        self.store = self._open()

    def put(self) -> None:
        """One batch."""
        keys = [chain_key(None, (self.num_put + lane).to_bytes(8, "little"), "bench") for lane in range(BATCH)]
        sizes = self._sizes()
        outcomes = self.store.put(keys, self._slots, sizes)
        check(set(outcomes) == {Outcome.STORED}, f"a put ended as {set(outcomes)}")
        self.num_put += BATCH
        self.written_nbytes += sum(sizes) * self._layout.spec.token_nbytes

    def make_room(self) -> None:
        """Untimed: a fresh store that is as large as the full one gives way to a new one."""
        if self._is_fresh and self.store.stats().usage.extent_used_nbytes > self._capacity_nbytes // 2:
            self.store.close()
            shutil.rmtree(self._folder)
            self.store = self._open()

    def _sizes(self) -> list[int]:
        most = self._layout.block_tokens
        if not self._has_many_sizes:
            return [most] * BATCH
        # Every batch holds as many bytes, in blocks of many sizes.
        halves = [self._rng.randint(1, most - 1) for _ in range(BATCH // 2)]
        return [*halves, *(most - size for size in halves)]

    def _open(self) -> Store:
        return Store.open(
            self._folder,
            access=Access.WRITE,
            layout=self._layout,
            profile=Profile.RAW,
            host_nbytes=2 * BATCH * self._layout.slot_nbytes,
            disk_nbytes=None if self._is_fresh else self._capacity_nbytes,
            durability=self._durability,
        )


def bench_put(
    report: Report, folder: Path, block_nbytes: int, capacity_nbytes: int, has_many_sizes: bool, durability: Durability
) -> None:
    """Age one store, then put into it and into a fresh one in turns; no byte of it may be lost."""
    spec = ModelSpec(1, 1, 64, 64, "bfloat16", "pre", "bench", "{}", "0")
    layout = BlockLayout(spec, block_nbytes // spec.token_nbytes)
    full = Putting(folder / "full", layout, has_many_sizes, capacity_nbytes, False, durability)
    fresh = Putting(folder / "fresh", layout, has_many_sizes, capacity_nbytes, True, durability)
    while full.written_nbytes < AGED * capacity_nbytes:
        full.put()
    timings = alternate({"fresh store": fresh.put, "full store": full.put}, fresh.make_room)
    extents = full.store.stats().num_blocks
    batch_nbytes = BATCH * block_nbytes // (2 if has_many_sizes else 1)
    case: dict[str, Any] = {
        "block_nbytes": block_nbytes,
        "sizes": "many" if has_many_sizes else "one",
        "durability": str(durability),
        "capacity_mib": capacity_nbytes >> 20,
        "extents": extents,
        "place": file_system(folder),
    }
    found, against = ("full store", timings["full store"]), ("fresh store", timings["fresh store"])
    report.rate("put", batch_nbytes / 1e6, "MB/s of raw KV", found, against, **case)
    usage = full.store.stats().usage
    held, budget = ("held by blocks", usage.extent_used_nbytes / 2**20), ("budget", capacity_nbytes / 2**20)
    report.value("room", "MiB", held, budget, **case)
    verified = full.store.verify()
    check(verified.is_clean and verified.account is not None, f"the full store is not sound: {verified.structure}")
    for each in (full, fresh):
        each.store.close()
    shutil.rmtree(folder / "full")
    shutil.rmtree(folder / "fresh")


def bench_allocator(report: Report, counts: tuple[int, ...]) -> None:
    """Allocate and release among ever more holes; the baseline has a thousand."""
    timings: dict[str, dict[str, Any]] = {"where there is room": {}, "where there is none": {}}
    for count in counts:
        space = FreeSpace.around(((2 * page, 1) for page in range(count)), 2 * count)
        calls: dict[str, Callable[[], object]] = {
            "where there is room": lambda space=space: _take_and_give(space),  # type: ignore[misc]
            "where there is none": lambda space=space: space.allocate(2),  # type: ignore[misc]
        }
        for name, timing in alternate(calls, min_s=0.1).items():
            timings[name][f"{count:,} holes"] = timing
    least = f"{counts[0]:,} holes"
    for name, found in timings.items():
        for holes, timing in found.items():
            report.latency("allocate", (holes, timing), (least, found[least]), sought=name)


def _take_and_give(space: FreeSpace) -> None:
    offset = space.allocate(1)
    assert offset is not None, "half of the pages are free"
    space.release(offset, 1)


def main() -> None:
    """Measure in a scratch folder."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")

    settings = options("eviction", __doc__, add)
    report = Report(settings, {"aged": f"{AGED}x"})
    bench_allocator(report, (1_000, 100_000) if settings.quick else (1_000, 100_000, 1_000_000))
    cases = [(1 << 18, 64 << 20), (1 << 16, 64 << 20)] if settings.quick else [(1 << 18, 256 << 20), (4096, 64 << 20)]
    with TemporaryDirectory(dir=settings.folder) as scratch:
        for block_nbytes, capacity_nbytes in cases:
            for has_many_sizes in (False, True):
                for durability in (Durability.NONE, Durability.COMMIT):
                    if block_nbytes == 4096 and durability is Durability.COMMIT:
                        continue  # so many blocks, 16 a sync: an hour of syncs
                    bench_put(report, Path(scratch), block_nbytes, capacity_nbytes, has_many_sizes, durability)
    report.write()


if __name__ == "__main__":
    main()
