# SPDX-License-Identifier: Apache-2.0
"""examples/record_screen.py: what it says about its video is true, and the same seed makes the same video."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import pytest

_RECORDER = Path(__file__).parents[1] / "examples" / "record_screen.py"


class _Recording(Protocol):
    video: Path
    truth: dict[str, Any]


def _record(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_RECORDER), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_screens_follow_each_other_without_gaps(recording: _Recording) -> None:
    screens = recording.truth["screens"]
    assert len(screens) == 6
    assert screens[0]["start_s"] == 0
    assert screens[-1]["end_s"] == recording.truth["duration_s"] == 180
    assert all(one["end_s"] == other["start_s"] for one, other in itertools.pairwise(screens))


def test_every_noted_fact_stands_on_its_screen_only(recording: _Recording) -> None:
    noted = [fact for fact in recording.truth["facts"] if fact["kind"] == "planted"]
    assert len(noted) == 3
    for fact in noted:
        shown = [[s["start_s"], s["end_s"]] for s in recording.truth["screens"] if fact["sentence"] in s["text"]]
        assert shown == fact["spans"]
        assert fact["answer"] in fact["sentence"]


def test_natural_questions_point_to_their_sentence(recording: _Recording) -> None:
    assert recording.truth["natural"]
    for question in recording.truth["natural"]:
        for start_s, _ in question["spans"]:
            (text,) = [s["text"] for s in recording.truth["screens"] if s["start_s"] == start_s]
            assert question["sentence"] in " ".join(text.split())


def test_screens_are_full_but_not_crowded(recording: _Recording) -> None:
    assert all(300 < len(screen["text"]) < 2500 for screen in recording.truth["screens"])
    assert all(len(row) < 150 for screen in recording.truth["screens"] for row in screen["text"].split("\n"))


def test_equal_seeds_make_equal_files_and_others_do_not(tmp_path: Path) -> None:
    pytest.importorskip("av")
    first, same, other = (tmp_path / name / "v.mp4" for name in ("first", "same", "other"))
    for out, seed in ((first, "1"), (same, "1"), (other, "2")):
        assert _record(out, "--hours", "0.01", "--seed", seed).returncode == 0
    assert first.read_bytes() == same.read_bytes()
    assert first.with_suffix(".json").read_text() == same.with_suffix(".json").read_text()
    assert first.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("program", ["record_screen.py", "demo.py"])
def test_ctrl_c_ends_with_one_line_and_leaves_no_half_video(program: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    folder = tmp_path / "demo"
    where = ["--out", str(folder / "reading.mp4")] if program == "record_screen.py" else ["--folder", str(folder)]
    process = subprocess.Popen(
        [sys.executable, _RECORDER.with_name(program), *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s and not any(path.stat().st_size for path in folder.glob("*reading.mp4")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(said.splitlines()) == 1, said
    assert "interrupted" in said
    assert list(folder.iterdir()) == []


_INTERRUPTED_SPEECH = """
import signal
import numpy
from narrator import Narrator
narrator, as_array = Narrator(), numpy.ctypeslib.as_array
numpy.ctypeslib.as_array = lambda *arguments: (signal.raise_signal(signal.SIGINT), as_array(*arguments))[1]
try:
    narrator.say("A sentence that nobody hears to its end.")
except KeyboardInterrupt:
    print("stopped")
"""


def test_ctrl_c_inside_a_sentence_is_not_lost() -> None:
    pytest.importorskip("espeakng_loader")
    run = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED_SPEECH], capture_output=True, text=True, cwd=_RECORDER.parent, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "stopped\n", "")


def test_more_hours_than_there_is_text_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    refused = _record(tmp_path / "v.mp4", "--hours", "9")
    assert refused.returncode == 2
    assert "hours at most" in refused.stderr
    assert not (tmp_path / "v.mp4").exists()
