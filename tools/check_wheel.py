# SPDX-License-Identifier: Apache-2.0
"""Checks a built wheel: nothing but kvstore at the top, every module inside, and an import that stays light."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("av", "faiss", "faster_whisper", "lmdb", "tesserocr", "transformers", "triton")
# Compared with torch alone: what torch imports is not ours to forbid. The path keeps the checkout out of the import.
PROBE = f"""
import sys
import torch
before = set(sys.modules)
import kvstore
print(kvstore.__file__)
print(*sorted(set({HEAVY!r}) & (set(sys.modules) - before)))
"""


def source_modules() -> set[str]:
    """Every Python file and stub of the package, as the wheel should name it."""
    found = set()
    for folder, folders, files in os.walk(ROOT / "kvstore", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        relative = Path(folder).relative_to(ROOT)
        found |= {str(relative / name) for name in files if name.endswith((".py", ".pyi", ".typed"))}
    return found


def check_contents(wheel: Path) -> None:
    """Compare the wheel's names with the source tree; exits with what differs."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = next(name for name in names if name.endswith(".dist-info/top_level.txt"))
        top_level = archive.read(info).decode().split()
    inside = {name for name in names if ".dist-info/" not in name}
    natives = {name for name in inside if name.startswith("kvstore/_native.") and name.endswith(".so")}
    if top_level != ["kvstore"]:
        sys.exit(f"{wheel.name}: top_level is {top_level}; it must be kvstore alone")
    if len(natives) != 1:
        sys.exit(f"{wheel.name}: one native module expected, found {sorted(natives)}")
    expected = source_modules()
    if inside - natives != expected:
        sys.exit(
            f"{wheel.name}: missing {sorted(expected - inside)}, "
            f"unexpected {sorted(inside - natives - expected)}; see packages in setup.py"
        )


def check_import(site: Path) -> None:
    """Import kvstore from the unpacked wheel in a fresh process; exits if it drags in an optional package."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    probe = [sys.executable, "-c", PROBE]
    output = subprocess.run(probe, cwd=site, env=environment, check=True, capture_output=True, text=True).stdout
    location, heavy = output.split("\n")[:2]
    if not Path(location).is_relative_to(site):
        sys.exit(f"kvstore was imported from {location}, not from {site}")
    if heavy:
        sys.exit(f"import kvstore also imports: {heavy}")


if __name__ == "__main__":
    wheel, site = (Path(argument).resolve() for argument in sys.argv[1:])
    check_contents(wheel)
    check_import(site)
    print(f"{wheel.name}: contents and import are right")
