# SPDX-License-Identifier: Apache-2.0
"""kvstore/video/decode.py: frames on a fixed grid, exact seeking, one clear error for what is not a video."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

av = pytest.importorskip("av")

from kvstore.errors import ConfigError, MediaError  # noqa: E402
from kvstore.video.decode import AUDIO_RATE, THUMBNAIL_SHAPE, audio_chunks, probe, sample_frames  # noqa: E402


class _Recording(Protocol):
    video: Path
    truth: dict[str, Any]


def _write_video(path: Path, levels: list[int], *, fps: int = 4, gop: int = 8, codec: str = "libx264") -> Path:
    """A video whose frames are plain grey of the given levels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.options = {"x264-params": "bframes=2:scenecut=0"} if codec == "libx264" else {}
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((144, 160), level, dtype=np.uint8), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _write_sound(path: Path, seconds: float) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100, layout="stereo")
        phase = np.arange(int(44_100 * seconds)) * (2 * np.pi * 440 / 44_100)
        wave = (8000 * np.sin(phase)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.repeat(wave, 2)[None], format="s16", layout="stereo")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_probe_tells_size_length_and_sound(recording: _Recording) -> None:
    info = probe(recording.video)
    assert (info.width, info.height) == (1280, 720)
    assert info.duration_s == pytest.approx(180, abs=1.1)
    assert info.has_audio == any(fact["kind"] == "spoken" for fact in recording.truth["facts"])


def test_content_id_follows_content_not_name(tmp_path: Path) -> None:
    first = _write_video(tmp_path / "a.mp4", [50] * 8)
    renamed = tmp_path / "b.mp4"
    renamed.write_bytes(first.read_bytes())
    assert probe(first).content_id == probe(renamed).content_id
    assert probe(first).content_id != probe(_write_video(tmp_path / "c.mp4", [90] * 8)).content_id


def test_frames_are_in_colour_and_thumbnails_grey(tmp_path: Path) -> None:
    (frame,) = sample_frames(_write_video(tmp_path / "a.mp4", [128]), fps=1)
    assert frame.rgb().shape == (96, 160, 3)
    assert frame.rgb().dtype == np.uint8
    assert frame.thumbnail.shape == THUMBNAIL_SHAPE


@pytest.mark.parametrize(("fps", "times"), [(1, [0, 1, 2]), (2, [0, 0.5, 1, 1.5, 2, 2.5]), (0.5, [0, 2])])
def test_sampling_takes_the_first_frame_of_each_interval(tmp_path: Path, fps: float, times: list[float]) -> None:
    video = _write_video(tmp_path / "a.mp4", [20 * i for i in range(12)])
    assert [frame.time_s for frame in sample_frames(video, fps)] == times


def test_sampling_faster_than_the_video_yields_every_frame_once(tmp_path: Path) -> None:
    video = _write_video(tmp_path / "a.mp4", [20 * i for i in range(12)])
    assert [frame.time_s for frame in sample_frames(video, fps=30)] == [i / 4 for i in range(12)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mpg"])
@pytest.mark.parametrize("start_s", [0.25, 1.0, 3.9, 4.0, 4.1, 9.5])
def test_a_later_start_yields_the_rest_of_the_same_frames(tmp_path: Path, suffix: str, start_s: float) -> None:
    codec = "mpeg2video" if suffix == "mpg" else "libx264"
    fps = 25 if suffix == "mpg" else 4
    video = _write_video(tmp_path / f"a.{suffix}", [16 + 5 * i for i in range(40)] * (fps // 4), fps=fps, codec=codec)
    full = [frame for frame in sample_frames(video, fps=2) if frame.time_s >= start_s]
    late = list(sample_frames(video, fps=2, start_s=start_s))
    assert full
    assert [frame.time_s for frame in late] == [frame.time_s for frame in full]
    assert all(np.array_equal(one.thumbnail, other.thumbnail) for one, other in zip(late, full, strict=True))


@pytest.mark.parametrize("start_s", [9.75, 10.0, 10_000.0])
def test_a_start_past_the_last_frame_yields_nothing(tmp_path: Path, start_s: float) -> None:
    video = _write_video(tmp_path / "a.mp4", [50] * 39)
    assert list(sample_frames(video, fps=4, start_s=start_s)) == []


def test_damage_in_the_middle_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    video = tmp_path / "a.mkv"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.gop_size = 8
        for number in range(80):
            frame = av.VideoFrame.from_ndarray(rng.integers(16, 235, (144, 160), dtype=np.uint8), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 4)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = bytearray(video.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    video.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        times = [frame.time_s for frame in sample_frames(video, fps=4)]
    assert 40 < len(times) < 80
    assert times[-1] > 18
    assert "damaged" in caplog.text


def _text(path: Path) -> None:
    path.write_text("These are words, not pictures.\n" * 40)


def _empty(path: Path) -> None:
    path.touch()


def _sound_only(path: Path) -> None:
    _write_sound(path.with_suffix(".m4a"), 1.0).rename(path)


def _header_only(path: Path) -> None:
    _write_video(path, [])


def _cut_short(path: Path) -> None:
    _write_video(path, [16 + i for i in range(200)])
    path.write_bytes(path.read_bytes()[:3000])


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (_text, "cannot be opened as a video"),
        (_empty, "is empty"),
        (_sound_only, "no video stream"),
        (_header_only, "no "),
        (_cut_short, "cannot be opened"),
        (_folder, "not a file"),
    ],
)
def test_what_is_no_video_gets_one_clear_line(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "x.mp4"
    make(path)
    for read in (probe, lambda path: next(sample_frames(path, fps=1))):
        with pytest.raises(MediaError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_text_file_is_not_drawn_as_a_terminal(tmp_path: Path) -> None:
    _text(tmp_path / "x.txt")
    with pytest.raises(MediaError, match="not a video"):
        probe(tmp_path / "x.txt")


@pytest.mark.parametrize(("fps", "start_s"), [(0, 0), (-1, 0), (float("nan"), 0), (1, -0.5), (1, float("inf"))])
def test_impossible_sampling_is_refused(tmp_path: Path, fps: float, start_s: float) -> None:
    with pytest.raises(ConfigError):
        next(sample_frames(tmp_path / "x.mp4", fps, start_s))


def test_sound_comes_as_mono_at_the_right_pitch_and_length(tmp_path: Path) -> None:
    chunks = list(audio_chunks(_write_sound(tmp_path / "a.m4a", 2.0)))
    samples = np.concatenate([chunk.samples for chunk in chunks])
    assert samples.dtype == np.float32
    assert len(samples) == pytest.approx(2 * AUDIO_RATE, abs=0.1 * AUDIO_RATE)
    crossings = np.count_nonzero(np.diff(np.signbit(samples[4000:20_000])))
    assert crossings == pytest.approx(880, abs=4)
    assert chunks[-1].start_s == pytest.approx(2.0, abs=0.1)


def test_a_silent_video_yields_no_sound(tmp_path: Path) -> None:
    assert list(audio_chunks(_write_video(tmp_path / "a.mp4", [50] * 4))) == []
