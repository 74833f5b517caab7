# SPDX-License-Identifier: Apache-2.0
"""Core, codec and I/O without Python, under the compiler's checkers of addresses, undefined behaviour and races."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = [*HERE.glob("*.cpp"), *(path for part in ("core", "codec", "io") for path in CSRC.glob(f"{part}/*.cpp"))]
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]


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


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_native_code_is_clean(sanitizers: str, tmp_path: Path) -> None:
    compiler = compiler_with(sanitizers, tmp_path)
    flags = [*FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    objects = [tmp_path / f"{source.parent.name}-{source.stem}.o" for source in SOURCES]
    commands = [[compiler, *flags, "-c", str(s), "-o", str(t)] for s, t in zip(SOURCES, objects, strict=True)]
    with ThreadPoolExecutor(max_workers=2) as jobs:
        assert list(jobs.map(subprocess.call, commands)) == [0] * len(commands)
    subprocess.run([compiler, *flags, *objects, "-o", tmp_path / "native"], check=True)

    done = subprocess.run([tmp_path / "native"], capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
