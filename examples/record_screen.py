# SPDX-License-Identifier: Apache-2.0
"""Records a long screen video with known contents: someone reads Python's language reference and takes notes.

Writes VIDEO.mp4 and VIDEO.json, which says what stands on the screen when, and holds questions with their answers.

    python examples/record_screen.py --out demo/reading.mp4
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from demo_pages import Page, lay_out
from demo_screen import HEIGHT, WIDTH, Camera, draw, scroll
from narrator import Narrator

_SCREEN_S = 30
_JITTER_S = 4
_REST_S = 4
_TICKS_PER_S = 4
_SCROLLED_PART = 0.25
_AUDIO_RATE = 16_000
_SPEECH_DELAY_S = 6
_SCREENS_PER_FACT = 2
_SCREENS_PER_SPEECH = 4

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shot:
    """One screen of the recording: what it shows, from when to when (whole seconds), and how it comes in."""

    page: Page
    start_s: int
    end_s: int
    scrolls_in: bool


def main() -> None:
    """Record the video named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="video to write; the JSON goes beside it")
    parser.add_argument("--hours", type=float, default=2.1, help="length (default 2.1; the text lasts for about 2.3)")
    parser.add_argument("--seed", type=int, default=0, help="places of the notes, pointer, noise")
    options = parser.parse_args()
    facts: Json = json.loads(Path(__file__).with_name("demo_facts.json").read_text())
    rng = np.random.default_rng(options.seed)
    num_screens = max(1, round(options.hours * 3600 / _SCREEN_S))
    noted = _spread(facts["planted"], num_screens, _SCREENS_PER_FACT, rng)
    pages = list(lay_out({screen: fact["sentence"] for screen, fact in noted.items()}))
    if num_screens > len(pages):
        parser.error(f"--hours {options.hours}: the text lasts for {len(pages) * _SCREEN_S / 3600:.2f} hours at most")
    shots = _timeline(pages[:num_screens], rng)
    try:
        narrator = Narrator()
    except ImportError:
        print("espeakng-loader is not installed: recording without the spoken facts")
        spoken = {}
        sounds = {}
    else:
        spoken = _spread(facts["spoken"], num_screens, _SCREENS_PER_SPEECH, rng)
        sounds = {screen: _resampled(narrator.say(f["sentence"]), narrator.sample_rate) for screen, f in spoken.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    truth = _truth(shots, noted, spoken, sounds, _located(facts["natural"], pages))
    truth |= {"video": options.out.name, "seed": options.seed}
    with _finished(options.out) as video, _finished(options.out.with_suffix(".json")) as text:
        text.write_text(json.dumps(truth, indent=1) + "\n")
        _encode(video, shots, sounds, rng)
    megabytes = options.out.stat().st_size / 1e6
    print(f"{options.out}: {shots[-1].end_s / 3600:.2f} h, {len(shots)} screens, {megabytes:.1f} MB")


@contextmanager
def _finished(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what is written there moves to `path` when all went well, and is removed otherwise."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _spread(facts: list[Json], num_screens: int, screens_each: int, rng: np.random.Generator) -> dict[int, Json]:
    """Choose facts by chance and give each a screen, at even distances over the whole recording."""
    count = min(len(facts), max(1, num_screens // screens_each))
    order = rng.permutation(len(facts))[:count]
    return {int((i + 0.5) * num_screens / count): facts[fact] for i, fact in enumerate(order)}


def _timeline(pages: list[Page], rng: np.random.Generator) -> list[Shot]:
    shots: list[Shot] = []
    start_s = 0
    jitter_s = 0
    for number, page in enumerate(pages):
        # Jitter comes in pairs that cancel out, so that the length is what was asked for.
        jitter_s = -jitter_s if number % 2 else int(rng.integers(-_JITTER_S, _JITTER_S + 1))
        if number == len(pages) - 1 and number % 2 == 0:
            jitter_s = 0
        end_s = start_s + _SCREEN_S + jitter_s
        shots.append(Shot(page, start_s, end_s, bool(number and rng.random() < _SCROLLED_PART)))
        start_s = end_s
    return shots


def _encode(path: Path, shots: list[Shot], sounds: dict[int, NDArray[np.int16]], rng: np.random.Generator) -> None:
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=_TICKS_PER_S)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        video.codec_context.time_base = Fraction(1, _TICKS_PER_S)
        video.codec_context.gop_size = 2 * _SCREEN_S
        video.codec_context.thread_count = 1  # output must not depend on the machine
        video.options = {"preset": "ultrafast", "crf": "32"}
        audio = container.add_stream("aac", rate=_AUDIO_RATE, layout="mono") if sounds else None
        if audio is not None:
            audio.bit_rate = 32_000
            # Noise substitution would make the decoded sound depend on where decoding began.
            audio.options = {"aac_pns": "0"}
        for number, frames in enumerate(_frames(shots, Camera(rng))):
            for tick, frame in frames:
                frame.pts, frame.time_base = tick, Fraction(1, _TICKS_PER_S)
                container.mux(video.encode(frame))
            if audio is not None:
                container.mux(audio.encode(_sound(shots[number], sounds.get(number))))
        container.mux(video.encode(None))
        if audio is not None:
            container.mux(audio.encode(None))


def _frames(shots: list[Shot], camera: Camera) -> Iterator[Iterator[tuple[int, av.VideoFrame]]]:
    """Yield each shot's frames with their time in ticks: one a second, and every tick while it scrolls in."""
    shown = None
    for number, shot in enumerate(shots):
        before, shown = shown, draw(shot.page, progress=number / len(shots))
        yield _shot_frames(shot, scroll(before, shown) if before is not None and shot.scrolls_in else (), shown, camera)


def _shot_frames(shot: Shot, moving: Any, shown: Any, camera: Camera) -> Iterator[tuple[int, av.VideoFrame]]:
    tick = shot.start_s * _TICKS_PER_S
    for picture in moving:
        yield tick, camera.shoot(picture, at_rest=True)
        tick += 1
    for time_s in range(math.ceil(tick / _TICKS_PER_S), shot.end_s):
        yield time_s * _TICKS_PER_S, camera.shoot(shown, at_rest=time_s >= shot.end_s - _REST_S)


def _sound(shot: Shot, speech: NDArray[np.int16] | None) -> av.AudioFrame:
    samples = np.zeros((1, (shot.end_s - shot.start_s) * _AUDIO_RATE), dtype=np.int16)
    if speech is not None:
        first = _SPEECH_DELAY_S * _AUDIO_RATE
        samples[0, first : first + len(speech)] = speech
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
    frame.sample_rate, frame.pts = _AUDIO_RATE, shot.start_s * _AUDIO_RATE
    frame.time_base = Fraction(1, _AUDIO_RATE)
    return frame


def _resampled(speech: NDArray[np.int16], sample_rate: int) -> NDArray[np.int16]:
    frame = av.AudioFrame.from_ndarray(speech[None], format="s16", layout="mono")
    frame.sample_rate = sample_rate
    resampler = av.AudioResampler(format="s16", layout="mono", rate=_AUDIO_RATE)
    pieces = [piece.to_ndarray()[0] for piece in (*resampler.resample(frame), *resampler.resample(None))]
    samples: NDArray[np.int16] = np.concatenate(pieces)
    return samples


def _located(questions: list[Json], pages: list[Page]) -> list[tuple[Json, list[int]]]:
    found = [(q, [number for number, page in enumerate(pages) if page.says(q["support"])]) for q in questions]
    lost = [question["support"] for question, numbers in found if not numbers]
    if lost:
        raise SystemExit(f"not on any screen, so these questions have no answer in the video: {lost}")
    return found


def _truth(
    shots: list[Shot],
    noted: dict[int, Json],
    spoken: dict[int, Json],
    sounds: dict[int, NDArray[np.int16]],
    natural: list[tuple[Json, list[int]]],
) -> Json:
    planted = [_fact("planted", fact, fact["sentence"], [shots[number]]) for number, fact in noted.items()]
    for number, fact in spoken.items():
        shot = shots[number]
        start_s = shot.start_s + _SPEECH_DELAY_S
        spans = [[start_s, round(start_s + len(sounds[number]) / _AUDIO_RATE, 2)]]
        planted.append(_fact("spoken", fact, fact["sentence"], [shot]) | {"spans": spans})
    # A question about a part of the text that a short recording does not reach has no answer in it.
    reached = [(fact, [shots[n] for n in numbers]) for fact, numbers in natural if numbers[-1] < len(shots)]
    return {
        "duration_s": shots[-1].end_s,
        "facts": planted,
        "natural": [_fact("natural", fact, fact["support"], where) for fact, where in reached],
        "screens": [{"start_s": shot.start_s, "end_s": shot.end_s, "text": shot.page.text} for shot in shots],
    }


def _fact(kind: str, fact: Json, sentence: str, shots: list[Shot]) -> Json:
    return {
        "kind": kind,
        "question": fact["question"],
        "answer": fact["answer"],
        "accept": fact["accept"],
        "sentence": sentence,
        "spans": [[shot.start_s, shot.end_s] for shot in shots],
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("record_screen: interrupted; nothing was kept", file=sys.stderr)
        sys.exit(130)
