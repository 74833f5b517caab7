# SPDX-License-Identifier: Apache-2.0
"""Builds and runs the fuzzers of tests/native/fuzz; see `make mutate` and `make fuzz`."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from pathlib import Path

from tests.native.building import FUZZ_TARGETS, LIBRARY, NATIVE, compile_objects, link

ROOT = Path(__file__).parents[1]
CORPUS = NATIVE / "fuzz" / "corpus"
CHECKERS = "address,undefined"


def mutate(folder: Path, num_mutants: int, seed: int) -> None:
    """Replay the corpus, then as many mutants of it."""
    compiler = os.environ.get("CXX", "g++")
    flags = [f"-fsanitize={CHECKERS}"]
    sources = [*LIBRARY, *FUZZ_TARGETS, NATIVE / "fuzz" / "mutate.cpp"]
    program = link(compiler, flags, compile_objects(compiler, flags, sources, folder), folder / "mutate")
    subprocess.run([program, CORPUS, str(num_mutants), str(seed)], check=True)


def fuzz(folder: Path, seconds: int) -> None:
    """Let libFuzzer look for `seconds` at every target, from a copy of the corpus; what it finds stays in `folder`."""
    compiler = shutil.which("clang++")
    if compiler is None:
        raise SystemExit("libFuzzer is part of clang: install clang, or use `make mutate`")
    # The plain loops alone: libFuzzer is here for its paths through the format, and mutants compare the levels.
    library_flags = ["-DKV_BASELINE", f"-fsanitize=fuzzer-no-link,{CHECKERS}"]
    objects = compile_objects(compiler, library_flags, [*LIBRARY, *FUZZ_TARGETS], folder)
    for source in sorted(CORPUS.iterdir()):
        target, flags = source.name, [f"-fsanitize=fuzzer,{CHECKERS}"]
        entry = NATIVE / "fuzz" / "entry.cpp"
        entries = compile_objects(compiler, [*flags, f"-DKV_FUZZ_TARGET={target}"], [entry], folder)
        program = link(compiler, flags, [*objects, *entries], folder / target)
        found = folder / "corpus" / target
        shutil.copytree(source, found, dirs_exist_ok=True)
        options = [f"-max_total_time={seconds}", f"-artifact_prefix={folder}/{target}-", "-print_final_stats=1"]
        subprocess.run([program, *options, found], check=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    mutator = commands.add_parser("mutate", help="mutate the corpus, with g++ and its sanitizers")
    mutator.add_argument("num_mutants", type=int)
    mutator.add_argument("--seed", type=int, default=1)
    fuzzer = commands.add_parser("fuzz", help="run libFuzzer on every target, with clang")
    fuzzer.add_argument("seconds", type=int)
    arguments = parser.parse_args()
    folder = ROOT / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.command == "mutate":
        mutate(folder, arguments.num_mutants, arguments.seed)
    else:
        fuzz(folder, arguments.seconds)


if __name__ == "__main__":
    main()
