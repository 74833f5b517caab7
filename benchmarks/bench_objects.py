# SPDX-License-Identifier: Apache-2.0
"""Reading a few parts of a large object of a stream in one call, against reading the same pages and nothing else."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Report, alternate, check, cpu, options, wall
from kvstore.codec import Profile
from kvstore.layout import ALIGNMENT, BlockLayout, round_up
from kvstore.native import Arena
from kvstore.spec import ModelSpec
from kvstore.store import Access, NewObject, Store, StreamHeader
from kvstore.tiers.tables.blocks import find_sound
from kvstore.tiers.tables.objects import find_object
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES
from kvstore.tiers.tables.streams import find_stream_id
from machine import file_system

SPEC = ModelSpec(1, 1, 64, 64, "bfloat16", "pre", "bench", "{}", "0")
NAME, KIND = "bench", "piece"


class Piece:
    """An object of equal parts in a scratch store, and which of them are read.

    Args:
        folder: where the store is made.
        num_parts: parts of the object.
        part_nbytes: bytes of each.
    """

    def __init__(self, folder: Path, num_parts: int, part_nbytes: int) -> None:
        noise = random.Random(0).randbytes(part_nbytes + num_parts)
        self.part_nbytes = part_nbytes
        self.parts = [noise[number : number + part_nbytes] for number in range(num_parts)]
        layout = BlockLayout(SPEC, 16)
        self.store = Store.open(folder, access=Access.WRITE, layout=layout, host_nbytes=1 << 20)
        self.store.create_stream(StreamHeader(NAME, SPEC, 16, Profile.LOSSLESS, "none", {}, 0.0))
        self.store.put_objects(NAME, [NewObject(KIND, 0, 0, self.parts)])
        self.store.flush()
        disk = self.store._disk
        with disk.catalogue.read() as view:
            row = find_object(view, find_stream_id(view, NAME), KIND, 0)
            record = None if row is None else find_sound(view, row.body)
        assert record is not None, "it was just stored"
        self._file = disk.files.file(record.extent.file_id)
        self._first = record.extent.offset + EXTENT_HEADER_NBYTES + record.record_nbytes - num_parts * part_nbytes

    def read(self, wanted: list[int]) -> None:
        """As a retriever does: one call, parts as bytes, checked."""
        found = self.store.read_object(NAME, KIND, 0, wanted)
        check(found[0] == self.parts[wanted[0]] and None not in found, "a part is missing")

    def transfers(self, wanted: list[int]) -> Callable[[], object]:
        """The same pages, one transfer for each part, to memory that is there; nothing is copied or checked."""
        ops, at = [], 0
        for part in wanted:
            begin = self._first + part * self.part_nbytes
            start = begin // ALIGNMENT * ALIGNMENT
            nbytes = round_up(begin + self.part_nbytes) - start
            ops.append((start, at, nbytes))
            at += nbytes
        return partial(self.store._pool.read, self._file, Arena(at, False), ops)


def bench_reads(report: Report, piece: Piece, count: int, place: str) -> None:
    """Parts that are drawn at random, and as many in runs of eight."""
    rng = random.Random(1)
    starts = rng.sample(range(0, len(piece.parts) - 8, 8), count // 8)
    for order, wanted in (
        ("scattered", sorted(rng.sample(range(len(piece.parts)), count))),
        ("runs of 8", [start + part for start in sorted(starts) for part in range(8)]),
    ):
        calls: dict[str, Callable[[], object]] = {
            "read_object": partial(piece.read, wanted),
            "its pages alone": piece.transfers(wanted),
        }
        case = {"order": order, "parts": len(wanted), "of": len(piece.parts), "part_nbytes": piece.part_nbytes}
        for clock_name, clock in (("wall", wall), ("processor", cpu)):
            timings = alternate(calls, clock=clock)
            found, base = (("read_object", timings["read_object"]), ("its pages alone", timings["its pages alone"]))
            report.latency("read parts", found, base, clock=clock_name, place=place, **case)


def main() -> None:
    """Measure in a scratch folder."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")

    settings = options("objects", __doc__, add)
    report = Report(settings)
    with TemporaryDirectory(dir=settings.folder) as scratch:
        for part_nbytes, num_parts, count in ((96 << 10, 10_000, 600), (4 << 10, 10_000, 600)):
            if settings.quick:
                num_parts, count = num_parts // 10, count // 10
            piece = Piece(Path(scratch) / str(part_nbytes), num_parts, part_nbytes)
            bench_reads(report, piece, count // 8 * 8, file_system(Path(scratch)))
            piece.store.close()
    report.write()


if __name__ == "__main__":
    main()
