# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: the clock, the fingerprint of the machine, the options, the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Spinning threads of two OpenMP runtimes on few cores make any figure meaningless. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIN_ITERATIONS = 30
MIN_S = 1.0
WARM_UPS = 3
PACKAGES = ("torch", "transformers", "lmdb", "zstandard", "faiss-cpu", "triton", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "sse4_2")


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


def measure(call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Timing:
    """Time a call: warm-up, then at least `MIN_ITERATIONS` calls and `MIN_S` seconds; `prepare` runs untimed."""
    return alternate({"": call}, prepare)[""]


def alternate(
    calls: Mapping[str, Callable[[], object]], prepare: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """Time several calls in turns, so that what disturbs the machine disturbs all of them alike.

    A call that has had its iterations and its time leaves the round.
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
            began = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - began)
            if len(samples[name]) >= MIN_ITERATIONS and sum(samples[name]) >= MIN_S:
                del left[name]
    return {name: Timing.of(times) for name, times in samples.items()}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    `ratio` is this value over that of the row named `baseline` in the same run, turned so that above 1 is better;
    0 where there is no baseline. `p10` and `p90` are in `unit` too.
    """

    bench: str
    case: dict[str, Any]
    metric: str
    value: float
    p10: float
    p90: float
    unit: str
    baseline: str
    ratio: float


@dataclass(slots=True)
class Report:
    """Collects rows, prints each as it comes, and writes them with the machine they stand for."""

    bench: str
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    def rate(
        self,
        metric: str,
        amount: float,
        unit: str,
        timing: Timing,
        against: tuple[str, Timing] | None = None,
        **case: Any,
    ) -> None:
        """Add `amount` per second; `against` is the baseline's name and its timing for the same amount."""
        self._add(
            metric,
            (amount / timing.median_s, amount / timing.p90_s, amount / timing.p10_s),
            unit,
            (against[0], against[1].median_s / timing.median_s) if against else ("", 0.0),
            {**case, "iterations": timing.iterations},
        )

    def latency(self, metric: str, timing: Timing, against: tuple[str, Timing] | None = None, **case: Any) -> None:
        """Add microseconds per call."""
        self._add(
            metric,
            (timing.median_s * 1e6, timing.p10_s * 1e6, timing.p90_s * 1e6),
            "us",
            (against[0], against[1].median_s / timing.median_s) if against else ("", 0.0),
            {**case, "iterations": timing.iterations},
        )

    def value(self, metric: str, value: float, unit: str, **case: Any) -> None:
        """Add a figure that is counted, not timed."""
        self._add(metric, (value, value, value), unit, ("", 0.0), case)

    def _add(
        self,
        metric: str,
        values: tuple[float, float, float],
        unit: str,
        baseline: tuple[str, float],
        case: dict[str, Any],
    ) -> None:
        value, p10, p90 = (float(f"{number:.5g}") for number in values)
        settings = {**case, "threads": self.options.threads}
        row = Row(self.bench, settings, metric, value, p10, p90, unit, baseline[0], float(f"{baseline[1]:.4g}"))
        self.rows.append(row)
        what = " ".join(f"{name}={setting}" for name, setting in case.items())
        spread = f"({p10:g} - {p90:g})" if p10 != p90 else ""
        against = f"{row.ratio:g} x {row.baseline}" if row.baseline else ""
        print(f"{self.bench} | {metric} | {what} | {value:g} {unit} {spread} | {against}", flush=True)

    def write(self) -> None:
        """Write the rows where --json says; rows of other benchmarks stay if they are of this machine and commit."""
        if self.options.json is None:
            return
        path: Path = self.options.json
        found: dict[str, Any] = {"machine": machine(), "commit": commit(), "rows": []}
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if (before["machine"], before["commit"]) == (found["machine"], found["commit"]):
                found["rows"] = [row for row in before["rows"] if row["bench"] != self.bench]
        found["load_average"] = os.getloadavg()[0]  # above the number of cores: neighbours disturbed this
        found["rows"] += [asdict(row) for row in self.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def options(
    description: str, add: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> argparse.Namespace:
    """Parse the options that all benchmarks take, set the thread count, and say on what this runs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases; each is still measured in full")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch and FAISS")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=RESULTS / f"{machine_name()}.json",
        help="write the rows there; without a path, to benchmarks/results under this machine's name",
    )
    add(parser)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    print(f"# {machine_name()}, {parsed.threads} threads, commit {commit()}, load {os.getloadavg()[0]:.1f}")
    return parsed


def machine() -> dict[str, Any]:
    """Fingerprint of the machine and of what runs on it; no names of hosts or people."""
    cpu = _cpu()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }


def machine_name() -> str:
    """Name of a kind of machine, for a file: its processor, cores and memory."""
    found = machine()
    text = f"{found['cpu']} {found['cores']} cores {found['memory_gib']:.0f} gib"
    text += "" if found["gpu"] == "none" else f" {found['gpu']}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    """Commit of the tree, with `+dirty` when files other than results have changed."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+dirty" if changes else head


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, and its device."""
    mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    inside = [mount for mount in mounts if path.resolve().is_relative_to(mount[1])]
    device, _, kind = max(inside, key=lambda mount: len(mount[1]))
    return f"{kind} on {device}"


def check(holds: bool, what: str) -> None:
    """Stop when a result is wrong: a fast wrong answer is no figure."""
    if not holds:
        sys.exit(f"wrong result: {what}")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cpu() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
