# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: the clock, the options, and the report, in which no figure stands without its baseline."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Spinning threads of two OpenMP runtimes on few cores make any figure meaningless. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from machine import ROOT, commit, machine, machine_name

RESULTS = ROOT / "benchmarks" / "results"
MIN_ITERATIONS = 30
MIN_S = 1.0
WARM_UPS = 3

Clock = Callable[[], float]
wall: Clock = time.perf_counter
cpu: Clock = time.process_time
"""Processor seconds of all threads: neighbours on the machine disturb it less than wall time."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median and spread over `iterations` calls."""

    median_s: float
    p10_s: float
    p90_s: float
    iterations: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """Sum samples up."""
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return Timing(statistics.median(samples), deciles[0], deciles[-1], len(samples))


Timed = tuple[str, Timing]
"""What was timed, by name."""


def alternate(
    calls: Mapping[str, Callable[[], object]],
    prepare: Callable[[], object] = lambda: None,
    *,
    clock: Clock = wall,
    min_s: float = MIN_S,
) -> dict[str, Timing]:
    """Time several calls in turns, so that what disturbs the machine disturbs all of them alike.

    Each is warmed up, then called at least `MIN_ITERATIONS` times and for `min_s` seconds; one that has had both leaves
    the round. `prepare` runs untimed before every call.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UPS):
            prepare()
            call()
    left = dict(calls)
    while left:
        for name, call in list(left.items()):
            prepare()
            began = clock()
            call()
            samples[name].append(clock() - began)
            if len(samples[name]) >= MIN_ITERATIONS and sum(samples[name]) >= min_s:
                del left[name]
    return {name: Timing.of(times) for name, times in samples.items()}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    `case["what"]` was measured; `ratio` is `value` over that of the row whose `case["what"]` is `baseline`, all else
    being equal: a rival or a limit of the same run. A baseline is its own baseline.
    """

    bench: str
    case: dict[str, Any]
    metric: str
    value: float
    unit: str
    baseline: str
    ratio: float


@dataclass(slots=True)
class Report:
    """Collects rows, prints each as it comes, and writes them with the machine they stand for."""

    options: argparse.Namespace
    common: dict[str, Any] = field(default_factory=dict)
    """What all rows have in their case; printed once."""
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, setting in self.common.items():
            print(f"# {name}: {setting}")

    def rate(self, metric: str, amount: float, unit: str, found: Timed, against: Timed, **case: Any) -> None:
        """Add `amount` per second, and that of the baseline for the same amount."""
        for name, timing in (against, found):
            spread = f"({amount / timing.p90_s:.4g} - {amount / timing.p10_s:.4g}, {timing.iterations} times)"
            value, limit = amount / timing.median_s, amount / against[1].median_s
            self._add(metric, unit, name, value, against[0], limit, spread, case)

    def latency(self, metric: str, found: Timed, against: Timed, **case: Any) -> None:
        """Add microseconds per call, and those of the baseline."""
        for name, timing in (against, found):
            spread = f"({timing.p10_s * 1e6:.4g} - {timing.p90_s * 1e6:.4g}, {timing.iterations} times)"
            value, limit = timing.median_s * 1e6, against[1].median_s * 1e6
            self._add(metric, "us", name, value, against[0], limit, spread, case)

    def value(self, metric: str, unit: str, found: tuple[str, float], against: tuple[str, float], **case: Any) -> None:
        """Add a figure that is counted or stated, not timed, and its baseline, which is not 0."""
        for name, value in (against, found):
            self._add(metric, unit, name, value, against[0], against[1], "", case)

    def _add(
        self,
        metric: str,
        unit: str,
        what: str,
        value: float,
        baseline: str,
        limit: float,
        spread: str,
        case: dict[str, Any],
    ) -> None:
        settings = {"what": what, "threads": self.options.threads, **self.common, **case}
        value, ratio = float(f"{value:.6g}"), float(f"{value / limit:.6g}")
        row = Row(self.options.bench, settings, metric, value, unit, baseline, ratio)
        if row in self.rows:  # a baseline that others have been compared with
            return
        self.rows.append(row)
        details = " ".join(f"{name}={setting}" for name, setting in case.items())
        against = f"{row.ratio:.4g} x {baseline}" if what != baseline else "baseline"
        print(f"{row.bench} | {metric} | {what} | {value:.4g} {unit} {spread} | {against} | {details}", flush=True)

    def write(self) -> None:
        """Check that every ratio is what the rows say, and write them where --json says."""
        check_rows([asdict(row) for row in self.rows])
        if self.options.json is None:
            return
        path: Path = self.options.json
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(), "commit": commit(), "rows": [asdict(row) for row in self.rows]}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Stop unless every row's baseline is there, and its ratio is what the two values say."""
    values = {_place(row, row["case"]["what"]): row["value"] for row in rows}
    for row in rows:
        place = _place(row, row["baseline"])
        check(place in values, f"no row of the baseline {place}")
        wrong = abs(row["value"] - row["ratio"] * values[place])
        check(wrong <= 1e-4 * abs(row["value"]) + 1e-12, f"{place}: {row['ratio']} is not the ratio of {row}")


def _place(row: Mapping[str, Any], what: str) -> tuple[str, str, str, str]:
    return row["bench"], row["metric"], row["unit"], json.dumps({**row["case"], "what": what}, sort_keys=True)


def options(
    bench: str, description: str | None, add: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> argparse.Namespace:
    """Parse the options that all benchmarks take, set the thread count, and say on what this runs."""
    parser = argparse.ArgumentParser(prog=f"kvstore bench {bench}", description=description)
    parser.set_defaults(bench=bench)
    parser.add_argument("--quick", action="store_true", help="fewer cases, and less time for each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch and FAISS")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=RESULTS / machine_name() / f"{bench}.json",
        metavar="FILE",
        help="write the rows there; without FILE, to benchmarks/results under this machine's name",
    )
    add(parser)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    print(f"# {machine_name()}, {parsed.threads} threads, commit {commit()}, load {os.getloadavg()[0]:.1f}")
    return parsed


def check(holds: bool, what: str) -> None:
    """Stop when a result is wrong: a fast wrong answer is no figure."""
    if not holds:
        sys.exit(f"wrong result: {what}")
