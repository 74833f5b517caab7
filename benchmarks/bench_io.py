# SPDX-License-Identifier: Apache-2.0
"""The disk tier: cold batched fetches against plain reads of as many bytes, appends, and what a sync costs."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness import Report, alternate, check, options
from kvstore.codec import Profile
from kvstore.layout import ALIGNMENT, round_up
from kvstore.native import Arena, DirectFile, IoPool
from kvstore.spec import chain_key
from kvstore.store import (
    Access,
    Durability,
    Entry,
    FetchRequest,
    NewBlock,
    Outcome,
    Store,
    StreamHeader,
    Tier,
)
from machine import file_system
from real_kv import Corpus, add_options, corpus

BATCH = 4
STREAM = "bench"


class Writing:
    """A scratch store that the corpus is appended to again and again, under ever new keys."""

    def __init__(self, folder: Path, kv: Corpus, profile: Profile, durability: Durability) -> None:
        self.folder, self.profile, self.num_blocks = folder, profile, 0
        self._kv = kv
        self._sources = cycle(range(len(kv.slots)))
        self._tokens = 0
        self.store = Store.open(
            folder,
            access=Access.WRITE,
            layout=kv.layout,
            profile=profile,
            host_nbytes=4 * BATCH * kv.layout.slot_nbytes,
            durability=durability,
        )
        header = StreamHeader(STREAM, kv.layout.spec, kv.layout.block_tokens, profile, "bench", {}, 0.0)
        self.store.create_stream(header)

    def append(self, count: int) -> None:
        """Append the next blocks."""
        blocks = []
        for _ in range(count):
            source = next(self._sources)
            num_tokens = self._kv.num_tokens[source]
            key = chain_key(None, self.num_blocks.to_bytes(8, "little"), "bench")
            entry = Entry(self.num_blocks, key, num_tokens, self._tokens, 0.0, 0.0, 0)
            blocks.append(NewBlock(entry, self._kv.slots[source], b""))
            self.num_blocks += 1
            self._tokens += num_tokens
        self.store.append(STREAM, blocks, {})

    def append_and_flush(self) -> None:
        """One batch, until it is as durable as the store promises."""
        self.append(BATCH)
        self.store.flush()


def bench_append(report: Report, kv: Corpus, folder: Path, place: str) -> None:
    """Append and flush under both promises, in turns; the baseline writes the uncompressed bytes without a store."""
    kinds = [
        (Profile.LOSSLESS, Durability.NONE),
        (Profile.LOSSLESS, Durability.COMMIT),
        (Profile.RAW, Durability.COMMIT),
    ]
    writers = {kind: Writing(folder / f"append-{'-'.join(kind)}", kv, *kind) for kind in kinds}
    nbytes = BATCH * kv.raw_nbytes // len(kv.slots)
    with closing(IoPool(4)) as pool, closing(DirectFile(folder / "plain", True)) as plain:
        arena = Arena(round_up(nbytes), pinned=False)
        plain.preallocate(round_up(nbytes))

        def write_plainly() -> None:
            pool.submit_write(plain, arena, [(0, 0, round_up(nbytes))]).wait()
            plain.sync()

        torch.frombuffer(arena, dtype=torch.uint8)[: kv.layout.slot_nbytes].copy_(kv.slots[0])
        calls = {"write+sync": write_plainly} | {"-".join(kind): w.append_and_flush for kind, w in writers.items()}
        timings = alternate(calls)
        against = ("write+sync", timings["write+sync"])
        case: dict[str, Any] = {"batch": BATCH, "place": place, "direct": plain.is_direct}
        for kind in kinds:
            found = "-".join(kind), timings["-".join(kind)]
            report.rate("append", nbytes / 1e6, "MB/s of raw KV", found, against, **case)

        def write_page() -> None:
            pool.submit_write(plain, arena, [(0, 0, ALIGNMENT)]).wait()

        def write_page_and_sync() -> None:
            write_page()
            plain.sync()

        pages = alternate({"write": write_page, "write+sync": write_page_and_sync})
        report.latency("4 KiB", ("write+sync", pages["write+sync"]), ("write", pages["write"]), place=place)
    for writer in writers.values():
        writer.store.close()


def bench_fetch(report: Report, kv: Corpus, folder: Path, place: str, profile: Profile) -> None:
    """Fetch batches that memory does not hold; the baseline reads as many bytes of the same file in one go."""
    writing = Writing(folder / f"fetch-{profile}", kv, profile, Durability.NONE)
    writing.append(len(kv.slots))
    writing.store.flush()
    writing.store.close()
    # Two host slots: no batch finds the blocks of an earlier one in memory.
    with Store.open(
        writing.folder, access=Access.READ, layout=kv.layout, host_nbytes=2 * kv.layout.slot_nbytes
    ) as store:
        entries = store.manifest(STREAM).entries
        slots = [torch.zeros(kv.layout.slot_nbytes, dtype=torch.uint8) for _ in range(BATCH)]
        firsts = cycle(range(0, len(entries) - BATCH + 1, BATCH))

        def fetch() -> int:
            first = next(firsts)
            batch = entries[first : first + BATCH]
            found = store.fetch([FetchRequest(entry.key, slot) for entry, slot in zip(batch, slots, strict=True)])
            check(set(found.outcomes) == {Outcome.DISK}, f"a cold fetch ended with {found.outcomes}")
            return found.bytes_read[Tier.DISK]

        stored_nbytes = fetch()
        with plain_reader(writing.folder, stored_nbytes) as read_plainly:
            timings = alternate({"pread": read_plainly, "fetch": fetch})
    raw_nbytes = BATCH * kv.raw_nbytes / len(kv.slots)
    case: dict[str, Any] = {"profile": str(profile), "batch": BATCH, "place": place, "cold": "O_DIRECT"}
    found, against = ("fetch", timings["fetch"]), ("pread", timings["pread"])
    report.rate("read", stored_nbytes / 1e9, "GB/s of stored bytes", found, against, **case)
    report.rate("fetch", raw_nbytes / 1e9, "GB/s of raw KV", found, against, **case)
    report.latency("fetch", found, against, **case)


@contextmanager
def plain_reader(store: Path, nbytes: int) -> Iterator[Callable[[], None]]:
    """A call that reads the next `nbytes` of the first extent file, past the page cache where that is possible."""
    path = min((store / "extents").iterdir())
    size = path.stat().st_size
    firsts = cycle(range(0, max(size - nbytes, 0) + 1, round_up(nbytes)))
    with mmap.mmap(-1, round_up(nbytes)) as memory:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system without O_DIRECT, such as tmpfs
            descriptor = os.open(path, os.O_RDONLY)
        try:
            yield lambda: check(os.preadv(descriptor, [memory], next(firsts)) > 0, "nothing was read")
        finally:
            os.close(descriptor)


def main() -> None:
    """Measure in a scratch folder."""
    settings = options("disk", __doc__, add_options)
    kv = corpus(settings, 16 if settings.quick else 64)
    report = Report(settings, {"origin": kv.origin})
    with TemporaryDirectory(dir=settings.folder) as scratch:
        folder = Path(scratch)
        place = file_system(folder)
        for profile in (Profile.RAW, Profile.LOSSLESS):
            bench_fetch(report, kv, folder, place, profile)
        bench_append(report, kv, folder, place)
    report.write()


if __name__ == "__main__":
    main()
