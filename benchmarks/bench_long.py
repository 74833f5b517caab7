# SPDX-License-Identifier: Apache-2.0
"""What grows with a stream: memory, time and disk of appending to a made-up one and of asking it, over its length."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Report, Timing, check, options
from kvstore.retrieval.registry import policy_named
from long_streams.made import CHUNK_TOKENS, SPEC
from machine import ROOT

POLICIES = ("auto", "maxsim", "streaming_llm")
LENGTHS = (102_400, 1_003_520)
FULL_LENGTHS = (1_003_520, 10_035_200)
QUESTIONS = 48
QUICK_QUESTIONS = 12
_TOKEN_NBYTES = 2 * SPEC.token_nbytes
"""Room on disk that is asked for: records, and as much again for indices and the catalogue."""
_MIB = 1 << 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let the caller choose lengths, policies and place."""
    parser.add_argument("--full", action="store_true", help="one million tokens and ten; takes gigabytes and minutes")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"lengths, rounded up to multiples of {CHUNK_TOKENS}")
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="NAME", help="what is asked by")
    parser.add_argument("--folder", type=Path, help="where the scratch store is written; default: the system's")


def phase(*arguments: object) -> dict[str, Any]:
    """Run a phase in a process of its own: its memory is then nobody else's."""
    places = [str(ROOT / "benchmarks"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-m", "long_streams.phases", *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    check(done.returncode == 0, f"{arguments[0]} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def stored_nbytes(store: Path, folder: str) -> int:
    """Bytes that the files of a part of the store take on disk."""
    return sum(path.stat().st_blocks * 512 for path in (store / folder).rglob("*") if path.is_file())


class Lengths:
    """Figures by length; the shortest is what the others are compared with."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._first: dict[tuple[str, str], tuple[str, Any]] = {}

    def value(self, metric: str, unit: str, num_tokens: int, value: float, **case: Any) -> None:
        """Add a figure."""
        found = (f"{num_tokens} tokens", value)
        self.report.value(metric, unit, found, self._of_first(metric, case, found), **case)

    def latency(self, metric: str, num_tokens: int, samples_s: list[float], **case: Any) -> None:
        """Add times of one call."""
        found = (f"{num_tokens} tokens", Timing.of(samples_s))
        self.report.latency(metric, found, self._of_first(metric, case, found), **case)

    def _of_first(self, metric: str, case: dict[str, Any], found: tuple[str, Any]) -> tuple[str, Any]:
        return self._first.setdefault((metric, json.dumps(case)), found)


def report_append(lengths: Lengths, store: Path, found: dict[str, Any]) -> None:
    """What the process that appends took, and what is on disk then."""
    num_tokens = found["num_tokens"]
    lengths.value("append, peak memory", "MiB", num_tokens, found["peak"] / _MIB)
    lengths.value("append, memory at the end without files", "MiB", num_tokens, found["anonymous"] / _MIB)
    lengths.value("append, processor time", "us/token", num_tokens, found["cpu_s"] / found["appended"] * 1e6)
    for part in ("extents", "catalogue"):
        lengths.value(f"disk, {part}", "B/token", num_tokens, stored_nbytes(store, part) / num_tokens)


def report_ask(lengths: Lengths, policy: str, found: dict[str, Any]) -> None:
    """What the process that asked took, and what it found."""
    num_tokens, case = found["num_tokens"], {"policy": policy}
    lengths.value("ask, peak memory", "MiB", num_tokens, found["peak"] / _MIB, **case)
    lengths.value("ask, memory at the end without files", "MiB", num_tokens, found["anonymous"] / _MIB, **case)
    lengths.value("ask, opening", "s", num_tokens, found["open_s"], **case)
    lengths.value("ask, first question", "s", num_tokens, found["first_s"], **case)
    if policy_named(policy).retrieves:
        check(found["recall"] > 0, f"{policy} found no planted run in {num_tokens} tokens")
        lengths.value("recall", "share", num_tokens, found["recall"], **case)
    for name, metric in (
        ("recall_s", "ask, pass over the question"),
        ("choose_s", "ask, choosing and loading"),
        ("prefill_s", "ask, prefill"),
        ("decode_s", "ask, one token"),
        ("cpu_s", "ask, processor time of a question with 8 tokens of answer"),
    ):
        lengths.latency(metric, num_tokens, found[name][1:], **case)


def main() -> None:
    """Append to one stream up to each length in turn, and ask there."""
    settings = options("long", __doc__, add_options)
    wanted = settings.tokens or (FULL_LENGTHS if settings.full else LENGTHS)
    steps = sorted({-(-count // CHUNK_TOKENS) * CHUNK_TOKENS for count in wanted})
    lengths = Lengths(Report(settings, {"kv_nbytes_per_token": SPEC.token_nbytes}))
    with TemporaryDirectory(dir=settings.folder) as scratch:
        free = shutil.disk_usage(scratch).free
        check(free > steps[-1] * _TOKEN_NBYTES, f"{scratch} has {free} bytes free, {steps[-1]} tokens may take more")
        store = Path(scratch) / "store"
        for num_tokens in steps:
            report_append(lengths, store, phase("append", store, num_tokens))
            for policy in settings.policies:
                count = QUICK_QUESTIONS if settings.quick else QUESTIONS
                report_ask(lengths, policy, phase("ask", store, policy, count))
    lengths.report.write()


if __name__ == "__main__":
    main()
