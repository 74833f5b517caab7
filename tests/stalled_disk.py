# SPDX-License-Identifier: Apache-2.0
"""Runs tests' cases in a process that was started on a disk which can be stalled."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.store import Outcome, Store
from tests.store_blocks import block_key, make_slot, open_store

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from slow_disk import SlowDisk as SlowDisk

_ROOT = Path(__file__).parents[1]
HANG_S = 60.0
NUM_BLOCKS = 8


@contextmanager
def stored(disk: SlowDisk, folder: Path, host_slots: int = 2) -> Iterator[Store]:
    """A store whose blocks 0 to 7 are on disk and not in memory."""
    with open_store(folder, host_slots=host_slots) as store:
        for number in range(NUM_BLOCKS):
            assert store.put([block_key(number)], [make_slot(number)], [40]) == [Outcome.STORED]
        try:
            yield store
        finally:
            disk.set()


def run_cases(module: str, scratch: Path) -> None:
    """Run the `CASES` of a module, on the disk, and name those that hold, up to the first that fails."""
    for case in importlib.import_module(module).CASES:
        folder = scratch / "disk" / case.__name__
        folder.mkdir(parents=True)
        case(SlowDisk(scratch, scratch / "disk"), folder / "store")
        sys.stdout.write(f"{case.__name__} holds\n")
        sys.stdout.flush()


def run_on_disk(module: str, scratch: Path) -> str:
    """Start a process on the disk that runs the cases of a module; returns what it says."""
    (scratch / "disk").mkdir()
    environment = {**os.environ, **SlowDisk(scratch, scratch / "disk").environment}
    code = "import sys, pathlib, tests.stalled_disk as on; on.run_cases(sys.argv[1], pathlib.Path(sys.argv[2]))"
    command = [sys.executable, "-c", code, module, str(scratch)]
    child = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=5 * HANG_S)
    return child.stdout + child.stderr
