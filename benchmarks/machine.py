# SPDX-License-Identifier: Apache-2.0
"""The machine that figures stand for, and the state of the tree that made them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "lmdb", "zstandard", "faiss-cpu", "triton", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vbmi2", "avx512_vnni", "amx_bf16", "sse4_2")


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
        "load_average": round(os.getloadavg()[0], 2),  # above the number of cores: neighbours disturbed this
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
