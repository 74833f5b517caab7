# SPDX-License-Identifier: Apache-2.0
"""The Python in README.md runs, block after block in one process, as a reader would paste it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def readme_script(text: str) -> str:
    """All Python blocks of a Markdown text as one script; other lines become blank, so line numbers stay."""
    inside = False
    kept = []
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            kept.append("")
        else:
            kept.append(line if inside else "")
    return "\n".join(kept)


def test_readme_script_keeps_python_at_its_lines() -> None:
    text = "# Title\n```python\nx = 1\n```\n```sh\nls\n```\nprose\n"
    assert readme_script(text).rstrip("\n") == "\n\nx = 1"


def test_readme_python_runs(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README yet")
    script = tmp_path / "README.py"
    script.write_text(readme_script(readme.read_text(encoding="utf-8")), encoding="utf-8")
    run = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
