# SPDX-License-Identifier: Apache-2.0
"""`kvstore bench`: runs one of the benchmarks that come with the source tree."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kvstore.errors import ConfigError, MissingDependencyError

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "bench",
        help="measure this machine, from a source tree",
        description="Run a benchmark of the source tree, such as codec, io or session. `kvstore bench NAME --help` "
        "says what it can vary; --json FILE keeps the figures.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the benchmark; without one, those there are")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="its options, which come behind its name"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the script in a process of its own, which sets its threads before it loads torch; returns its exit code."""
    scripts = {path.stem[6:].replace("_", "-"): path for path in sorted(_FOLDER.glob("bench_*.py"))}
    # Beside an installed package, a folder of this name is of another one.
    if not scripts or not (_FOLDER / "harness.py").is_file():
        raise MissingDependencyError(
            "benchmarks come with the source tree, not with the package: run `python -m kvstore bench` in a checkout"
        )
    if options.name is None:
        raise ConfigError(f"which benchmark? Choose from {', '.join(scripts)}")
    if options.name not in scripts:
        raise ConfigError(f"there is no benchmark {options.name!r}: choose from {', '.join(scripts)}")
    # The script is to measure this package, not another one that is installed.
    places = [str(_FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run([sys.executable, scripts[options.name], *options.arguments], env=environment).returncode
