# SPDX-License-Identifier: Apache-2.0
"""kvstore/video/perception.py: observations in order, resumable, with errors and threads that do not leak."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

for _module in ("av", "tesserocr"):
    pytest.importorskip(_module)

from kvstore.errors import MediaError  # noqa: E402
from kvstore.video.changes import FrameGroup  # noqa: E402
from kvstore.video.ocr import ScreenReader  # noqa: E402
from kvstore.video.perception import Observation, Sentence, perceive  # noqa: E402


class _Recording(Protocol):
    video: Path
    truth: dict[str, Any]


class _Levels:
    """Describes a frame by its mean colour; counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def describe(self, group: FrameGroup) -> Observation:
        self.calls += 1
        return Observation(group.start_s, group.end_s, f"{group.frame.rgb().mean():.3f}")


class _Words:
    """Hears fixed sentences."""

    def __init__(self, *times_s: float) -> None:
        self._times_s = times_s

    def sentences(self, path: Path, start_s: float) -> Iterator[Sentence]:
        return (Sentence(time_s, time_s + 2, f"at {time_s:g}.") for time_s in self._times_s if time_s >= start_s)


class _Broken:
    def describe(self, group: FrameGroup) -> Observation:
        raise MediaError("the reader broke")


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvstore-perceive"]


def _plain(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def read(recording: _Recording) -> list[Observation]:
    return list(perceive(recording.video, ScreenReader()))


def test_there_is_one_observation_per_screen_and_no_gap(recording: _Recording, read: list[Observation]) -> None:
    screens = recording.truth["screens"]
    assert [observation.start_s for observation in read] == [screen["start_s"] for screen in screens]
    assert [observation.end_s for observation in read[:-1]] == [observation.start_s for observation in read[1:]]


def test_screens_are_read_right(recording: _Recording, read: list[Observation]) -> None:
    for observation, screen in zip(read, recording.truth["screens"], strict=True):
        likeness = difflib.SequenceMatcher(None, _plain(observation.text), _plain(screen["text"]), autojunk=False)
        assert likeness.ratio() >= 0.95


def test_every_noted_fact_can_be_read(recording: _Recording, read: list[Observation]) -> None:
    for fact in recording.truth["facts"]:
        if fact["kind"] == "planted":
            (text,) = [o.text for o in read if [o.start_s, round(o.end_s)] == fact["spans"][0]]
            assert fact["sentence"] in _plain(text)


def test_wrapped_lines_become_sentences(read: list[Observation]) -> None:
    assert any(len(line) > 200 for line in read[0].text.split("\n"))
    assert "\n\n" in read[0].text


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0])
def test_resuming_at_any_end_gives_the_same_rest(recording: _Recording, fps: float) -> None:
    words = _Words(3.0, 29.5, 61.0, 100.0, 179.0)
    whole = list(perceive(recording.video, _Levels(), fps=fps, listener=words))
    for number, observation in enumerate(whole):
        rest = list(perceive(recording.video, _Levels(), fps=fps, start_s=observation.end_s, listener=words))
        assert rest == whole[number + 1 :]


def test_what_is_said_joins_the_screen_during_which_it_begins(recording: _Recording) -> None:
    observations = list(perceive(recording.video, _Levels(), listener=_Words(1.0, 2.0, 179.5, 500.0)))
    assert observations[0].text.endswith("\n\nSpoken: at 1. at 2.")
    assert "Spoken" not in observations[1].text
    assert observations[-1].text.endswith("\n\nSpoken: at 179.5. at 500.")


def test_an_error_of_the_reader_reaches_the_caller(recording: _Recording) -> None:
    with pytest.raises(MediaError, match="the reader broke"):
        list(perceive(recording.video, _Broken()))
    assert not _threads()


def test_a_missing_file_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        next(perceive(tmp_path / "none.mp4", _Levels()))
    assert not _threads()


def test_closing_stops_the_thread_and_the_lookahead_is_bounded(recording: _Recording) -> None:
    levels = _Levels()
    observations = perceive(recording.video, levels, lookahead=1)
    next(observations)
    assert _threads()
    observations.close()
    assert not _threads()
    assert levels.calls <= 3
