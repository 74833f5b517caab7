# SPDX-License-Identifier: Apache-2.0
"""Runs the demo's programs, each in a process of its own, and measures what they take; describes the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from demo_scoring import Json


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process took: seconds by the clock, and the most memory it held, in bytes."""

    wall_s: float
    peak_rss_nbytes: int


def run(command: Sequence[str | Path]) -> Usage:
    """Run a program that shares the terminal; end this one with its exit code if it fails.

    The interpreter must be light: a child's peak counts what its parent held when it was forked.
    """
    sys.stdout.flush()
    began = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reaches it too, and it says what it leaves behind
        raise SystemExit(130) from None
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        print(f"demo: {Path(command[1]).name} ended with exit code {process.returncode}", file=sys.stderr)
        raise SystemExit(process.returncode if process.returncode > 0 else 1)
    return Usage(time.perf_counter() - began, usage.ru_maxrss << 10)


def digest_of(files: Iterable[Path], packages: Iterable[str], settings: Iterable[object]) -> str:
    """A name for what a program makes out of these sources, package versions and settings."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.read_bytes())
    for package in packages:
        try:
            digest.update(f"{package}=={version(package)}\n".encode())
        except PackageNotFoundError:
            digest.update(f"no {package}\n".encode())
    digest.update(repr([platform.python_version(), *settings]).encode())
    return digest.hexdigest()


def drop_page_cache(folder: Path) -> None:
    """Make the kernel forget every file of a folder, so that the next reader has to go to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)  # pages that are not on the disk yet cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def machine() -> Json:
    """Processor, cores this process may use, memory, system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }
