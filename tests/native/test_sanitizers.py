# SPDX-License-Identifier: Apache-2.0
"""Core, codec and I/O without Python, under the compiler's checkers of addresses, undefined behaviour and races."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.native.building import FUZZ_TARGETS, LIBRARY, compile_objects, link

pytestmark = pytest.mark.sanitizers

HERE = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
# The second build leaves the variants for newer CPUs out, so both kinds of loops are run here on any machine.
BUILDS = {"address,undefined": [], "thread": ["-DKV_BASELINE"]}
NUM_MUTANTS = 4000

Programs = Callable[[str], Path]
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
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Builds the programs `native` and `mutate` with some checkers; once per set of checkers."""

    @cache
    def build(sanitizers: str) -> Path:
        folder = tmp_path_factory.mktemp("native")
        compiler = compiler_with(sanitizers, folder)
        flags = [*WARNINGS, *BUILDS[sanitizers], f"-fsanitize={sanitizers}"]
        mains = {"native": sorted(HERE.glob("*.cpp")), "mutate": [*FUZZ_TARGETS, HERE / "fuzz" / "mutate.cpp"]}
        sources = [*LIBRARY, *(source for parts in mains.values() for source in parts)]
        objects = dict(zip(sources, compile_objects(compiler, flags, sources, folder), strict=True))
        for name, parts in mains.items():
            link(compiler, flags, [objects[source] for source in [*LIBRARY, *parts]], folder / name)
        return folder

    return build


@pytest.fixture(scope="module")
def finished(programs: Programs) -> Finished:
    """Runs the native tests to their end; once per set of checkers."""

    @cache
    def run(sanitizers: str) -> subprocess.CompletedProcess[str]:
        program = programs(sanitizers) / "native"
        return subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)

    return run


@pytest.mark.parametrize("sanitizers", BUILDS)
def test_native_code_is_clean(finished: Finished, sanitizers: str) -> None:
    done = finished(sanitizers)

    assert done.returncode == 0, done.stderr


def test_plain_loops_and_those_for_newer_cpus_make_the_same_bytes(finished: Finished) -> None:
    first, second = (finished(sanitizers).stdout for sanitizers in BUILDS)

    assert len(first) == 9
    assert first == second


@pytest.mark.parametrize("sanitizers", BUILDS)
def test_fuzzing_corpus_and_its_mutants_break_no_promise(programs: Programs, sanitizers: str) -> None:
    command = [str(programs(sanitizers) / "mutate"), str(HERE / "fuzz" / "corpus"), str(NUM_MUTANTS)]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
    assert f"{NUM_MUTANTS} mutants" in done.stdout
