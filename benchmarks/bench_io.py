# SPDX-License-Identifier: Apache-2.0
"""Tiers by size and queue depth: each way beside the limit of the same run, and beside what else keeps blocks."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import closing
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from harness import Report, Row, options
from kvstore.codec import Profile
from machine import file_system
from transfers.device import bench_device
from transfers.matrix import Matrix
from transfers.pipeline import bench_pipeline
from transfers.plot import Curve, drawing
from transfers.raw import build
from transfers.stores import Stores

_ROOF = "O_DIRECT, the faster loop"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="measure the file system of this folder, not of the temporary one")
    parser.add_argument("--plot", type=Path, help="draw bandwidth over block size there, as SVG")


def _measure(report: Report, settings: argparse.Namespace, folder: Path) -> None:
    """Way by way; whoever adds a tier adds its way here."""
    is_quick: bool = settings.quick
    place = file_system(folder)
    library = build(folder)
    with closing(Matrix(report, library, folder, place, is_quick=is_quick)) as matrix:
        matrix.run()
    least = 5 if is_quick else 15
    for size in (64 << 10,) if is_quick else (16 << 10, 64 << 10, 256 << 10, 1 << 20):
        with (
            TemporaryDirectory(dir=folder) as scratch,
            closing(Stores(report, library, Path(scratch), size, place, least)) as stores,
        ):
            stores.run()
    profiles = (Profile.Q3,) if is_quick else (Profile.RAW, Profile.LOSSLESS, Profile.Q3)
    for num_layers, profile in product((4,) if is_quick else (4, 28), profiles):
        with TemporaryDirectory(dir=folder) as scratch:
            bench_pipeline(report, library, Path(scratch), place, num_layers=num_layers, profile=profile, least=least)
    if torch.cuda.is_available():
        bench_device(report, [4 << 10, 64 << 10, 1 << 20], least)


def _panels(rows: Iterable[Row]) -> dict[str, dict[str, Curve]]:
    """Curves of transfers of 32 in flight, and of whole stores."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        case, what = row.case, str(row.case["what"])
        title = {"disk->host": "cold reads", "host->disk": "durable writes"}.get(case["way"])
        if title is None or row.metric == "puts in flight" or (row.metric == "transfer" and case["depth"] != 32):
            continue
        if what.startswith("O_DIRECT") and row.metric != "transfer":
            continue
        name = _ROOF if what.startswith("O_DIRECT") else what
        rates = found.setdefault(title, {}).setdefault(name, {})
        rates[case["size"]] = max(rates.get(case["size"], 0.0), row.value)
    return {title: {name: sorted(rates.items()) for name, rates in curves.items()} for title, curves in found.items()}


def _print_table(rows: list[Row]) -> None:
    """One line a case: the limit, and everything else as a share of it."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        case = row.case
        how = f"{case.get('profile', '')} {case.get('cold', '')}".strip()
        cell = (case["way"], row.metric, f"{case['size'] >> 10}", str(case.get("depth", 1)), how)
        lines.setdefault(cell, []).append(row)
    print(f"\n{'way':14}{'metric':17}{'KiB':>6}{'depth':>6}  limit in GB/s, and shares of it")
    for (way, metric, size, depth, how), found in lines.items():
        limit = found[0].baseline
        shares = [f"{row.case['what']} {row.ratio:.3g}" for row in found if row.baseline == limit != row.case["what"]]
        print(f"{way:14}{metric:17}{size:>6}{depth:>6}  {limit} {found[0].value:.3g}: {', '.join(shares)} ({how})")


def main() -> None:
    """Measure in a scratch folder."""
    settings = options("io", __doc__, _add_options)
    report = Report(settings)
    with TemporaryDirectory(dir=settings.folder) as scratch:
        _measure(report, settings, Path(scratch))
    _print_table(report.rows)
    report.write()
    if settings.plot is not None:
        settings.plot.write_text(drawing(_panels(report.rows), _ROOF), encoding="utf-8")


if __name__ == "__main__":
    main()
