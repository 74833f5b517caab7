# SPDX-License-Identifier: Apache-2.0
"""Compiles the native library without Python, under the compiler's checkers, for tests and fuzzers."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).parent
CSRC = NATIVE.parents[1] / "csrc"
LIBRARY = [
    path
    for part in ("core", "elements", "entropy", "planes", "basis", "codec", "io", "index")
    for path in sorted(CSRC.glob(f"{part}/*.cpp"))
]
FUZZ_TARGETS = [NATIVE / "fuzz" / f"{name}.cpp" for name in ("sample", "decoding", "encoding")]
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread", "-ffp-contract=off", "-fno-trapping-math", f"-I{CSRC}", f"-I{NATIVE}"]
FLAGS += ["-fno-sanitize-recover=all"]


def compile_objects(compiler: str, flags: Sequence[str], sources: Sequence[Path], folder: Path) -> list[Path]:
    """Compile two at a time.

    Raises:
        CalledProcessError: a source does not compile; the compiler has said why.
    """
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(max_workers=2) as jobs:
        list(jobs.map(compile_one, sources, objects))
    return objects


def link(compiler: str, flags: Sequence[str], objects: Sequence[Path], program: Path) -> Path:
    """Make a program of objects that were compiled with the same flags."""
    subprocess.run([compiler, *FLAGS, *flags, *objects, "-o", program], check=True)
    return program
