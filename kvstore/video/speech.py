# SPDX-License-Identifier: Apache-2.0
"""Writes down what is said in a video with Whisper. The only importer of `faster_whisper`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.extras import missing_dependency
from kvstore.video.assets import Asset
from kvstore.video.decode import AUDIO_RATE, audio_chunks
from kvstore.video.perception import Sentence

WINDOW_S = 24
"""Sound is transcribed in windows of this length; they are cut in a pause near each multiple of it."""

_BLOCK = WINDOW_S * AUDIO_RATE
_CUT_REACH = 3 * AUDIO_RATE
_HUSH = AUDIO_RATE // 10
_MARGIN = AUDIO_RATE // 4
_STAMP_JITTER = AUDIO_RATE // 20
_MAX_GAP = 12 * 3600 * AUDIO_RATE
_SILENCE_RMS = 0.003


def name_of(asset: Asset) -> str:
    """What decides the words that a `Transcriber` hears with this model: the model, and what runs it.

    Raises:
        MissingDependencyError: faster-whisper is not installed.
    """
    try:
        return f"{asset.package} {asset.version}, faster-whisper {version('faster-whisper')}"
    except PackageNotFoundError as error:
        raise missing_dependency("faster_whisper", "writing down speech") from error


class Transcriber:
    """Speech to text, on the CPU.

    Args:
        model: folder of a Whisper model in CTranslate2's format.
        language: two letters, e.g. `en`.
        num_threads: CPU threads.

    Raises:
        MissingDependencyError: faster-whisper is not installed.
        ConfigError: there is no such model in the folder.
    """

    def __init__(self, model: Path, *, language: str = "en", num_threads: int = 1) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise missing_dependency("faster_whisper", "writing down speech") from error
        if not (model / "model.bin").is_file():
            raise ConfigError(f"{model}: no Whisper model in CTranslate2's format here (no model.bin)")
        self._model = WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=num_threads)
        self._language = language

    def sentences(self, path: Path, start_s: float) -> Iterator[Sentence]:
        """Yield, in order of time, the sentences that begin at or after `start_s`; silence costs next to nothing.

        Raises:
            MediaError: as `audio_chunks`.
        """
        for first_sample, samples in _windows(path, start_s):
            loud = np.flatnonzero(_loudness(samples) >= _SILENCE_RMS)
            if loud.size == 0:
                continue
            # Whisper's times are better, and its guesses fewer, without silence at the ends.
            begin = max(0, int(loud[0]) * _HUSH - _MARGIN)
            samples = samples[begin : (int(loud[-1]) + 1) * _HUSH + _MARGIN]
            window_s = (first_sample + begin) / AUDIO_RATE
            for sentence in self._transcribed(samples, window_s):
                if sentence.start_s >= start_s:
                    yield sentence

    def _transcribed(self, samples: NDArray[np.float32], window_s: float) -> Iterator[Sentence]:
        segments, _ = self._model.transcribe(
            samples, language=self._language, beam_size=1, temperature=0.0, condition_on_previous_text=False
        )
        for segment in segments:
            if segment.text.strip():
                yield Sentence(window_s + segment.start, window_s + segment.end, segment.text.strip())


def _windows(path: Path, start_s: float) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (number of the first sample, samples) of every window that ends after `start_s`.

    Where a window is cut depends only on the sound near that cut, so it does not depend on `start_s`.
    """
    # The window that holds start_s may begin before its multiple, and its own first cut needs the one before.
    first_block = max(0, int(start_s // WINDOW_S) - 2)
    begin = first_block * _BLOCK
    held = np.empty(0, dtype=np.float32)
    for block in _blocks(path, first_block):
        joined = np.concatenate((held, block))
        if held.size:
            cut = _quietest(joined, max(0, held.size - _CUT_REACH), min(joined.size, held.size + _CUT_REACH))
            if begin + cut > start_s * AUDIO_RATE:
                yield begin, joined[:cut]
            begin += cut
            joined = joined[cut:]
        held = joined
    if held.size:
        yield begin, held


def _blocks(path: Path, first_block: int) -> Iterator[NDArray[np.float32]]:
    """Yield the sound as blocks of `_BLOCK` samples, the last one shorter, with silence where there are gaps."""
    block = np.zeros(_BLOCK, dtype=np.float32)
    block_at = first_block * _BLOCK
    filled = 0
    cursor = block_at
    for chunk in audio_chunks(path, first_block * WINDOW_S):
        samples, at = chunk.samples, round(chunk.start_s * AUDIO_RATE)
        if abs(at - cursor) <= _STAMP_JITTER:
            at = cursor
        if at - cursor > _MAX_GAP:
            continue  # a damaged time stamp, not a pause
        cursor = at + samples.size
        samples = samples[max(0, block_at - at) :]
        at = max(at, block_at)
        while at + samples.size > block_at + _BLOCK:
            room = max(0, block_at + _BLOCK - at)
            block[_BLOCK - room :] = samples[:room]
            yield block
            block = np.zeros(_BLOCK, dtype=np.float32)
            block_at += _BLOCK
            samples, at, filled = samples[room:], at + room, 0
        block[at - block_at : at - block_at + samples.size] = samples
        filled = max(filled, at - block_at + samples.size)
    if filled:
        yield block[:filled]


def _quietest(samples: NDArray[np.float32], begin: int, end: int) -> int:
    """Middle of the quietest moment of `samples[begin:end]`, the earliest of equals."""
    if end - begin < _HUSH:
        return end
    return begin + int(np.argmin(_loudness(samples[begin:end]))) * _HUSH + _HUSH // 2


def _loudness(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Root mean square of every whole tenth of a second."""
    frames = samples[: samples.size // _HUSH * _HUSH].reshape(-1, _HUSH)
    loudness: NDArray[np.float32] = np.sqrt(np.square(frames).mean(axis=1))
    return loudness
