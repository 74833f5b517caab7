# SPDX-License-Identifier: Apache-2.0
"""The frozen tables are what their generator makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_generator_makes_the_frozen_file(tmp_path: Path) -> None:
    made = tmp_path / "class_tables.inc"
    subprocess.run([sys.executable, ROOT / "tools" / "make_class_tables.py", made], check=True)

    assert made.read_text() == (ROOT / "csrc" / "entropy" / "class_tables.inc").read_text()
