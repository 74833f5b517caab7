# SPDX-License-Identifier: Apache-2.0
"""Core, codec and I/O without Python, under the compiler's checkers of addresses, undefined behaviour and races."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = [*HERE.glob("*.cpp"), *(path for part in ("core", "codec", "io") for path in CSRC.glob(f"{part}/*.cpp"))]
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread", "-ffp-contract=off", f"-I{CSRC}", "-fno-sanitize-recover=all"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
# The second build leaves the variants for newer CPUs out, so both kinds of loops are run here on any machine.
BUILDS = {"address,undefined": [], "thread": ["-DKV_BASELINE"]}

Finished = Callable[[str], subprocess.CompletedProcess[str]]


def compiler_with(sanitizers: str, folder: Path) -> str:
    """Name of a compiler that can link and run a program with these checkers, or skip."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [compiler, f"-fsanitize={sanitizers}", str(probe), "-o", str(folder / "probe")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 or subprocess.run([folder / "probe"], check=False).returncode != 0:
        pytest.skip(f"{compiler} has no working -fsanitize={sanitizers}")
    return compiler


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Builds the test program with some checkers and runs it to its end; once per set of checkers."""

    @cache
    def build_and_run(sanitizers: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("native")
        compiler = compiler_with(sanitizers, folder)
        flags = [*FLAGS, *WARNINGS, *BUILDS[sanitizers], f"-fsanitize={sanitizers}"]
        objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in SOURCES]
        commands = [[compiler, *flags, "-c", str(s), "-o", str(t)] for s, t in zip(SOURCES, objects, strict=True)]
        with ThreadPoolExecutor(max_workers=2) as jobs:
            assert list(jobs.map(subprocess.call, commands)) == [0] * len(commands)
        subprocess.run([compiler, *flags, *objects, "-o", folder / "native"], check=True)
        return subprocess.run([folder / "native"], capture_output=True, text=True, check=False, timeout=120)

    return build_and_run


@pytest.mark.parametrize("sanitizers", BUILDS)
def test_native_code_is_clean(finished: Finished, sanitizers: str) -> None:
    done = finished(sanitizers)

    assert done.returncode == 0, done.stderr


def test_plain_loops_and_those_for_newer_cpus_make_the_same_bytes(finished: Finished) -> None:
    first, second = (finished(sanitizers).stdout for sanitizers in BUILDS)

    assert len(first) == 9
    assert first == second
