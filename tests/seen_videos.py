# SPDX-License-Identifier: Apache-2.0
"""Short lossless videos of coloured scenes, a speaker without a speech model, and what an ingest makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.engines.loading import LanguageModel, load_model
from kvstore.store import Access, Entry, Store
from kvstore.video.decode import AUDIO_RATE
from kvstore.video.ingest import IngestConfig
from kvstore.video.perception import Sentence

SCENES = (1, 2, 1, 3, 4)
"""Scenes of two seconds each; the first and the third are the same."""
SCENE_S = 2.0
WORDS = "The quick brown fox jumps over the lazy dog. " * 8
ALL = 100_000
PLAIN = IngestConfig(window_tokens=ALL, block_tokens=64, device_nbytes=16 << 20)


def scene(seed: int) -> NDArray[np.uint8]:
    """A picture of coloured tiles, 96 x 64."""
    tiles = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return tiles.repeat(8, axis=0).repeat(8, axis=1)


def film(path: Path, scenes: Sequence[int] = SCENES, *, has_sound: bool = False) -> Path:
    """A lossless video of scenes at two frames per second; its sound, if any, is silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        sound = container.add_stream("pcm_s16le", rate=AUDIO_RATE, layout="mono") if has_sound else None
        for number, seed in enumerate(np.repeat(scenes, round(2 * SCENE_S))):
            frame = av.VideoFrame.from_ndarray(scene(int(seed)), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            silence = np.zeros((1, AUDIO_RATE), dtype=np.int16)
            heard = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = AUDIO_RATE, 0, Fraction(1, AUDIO_RATE)
            container.mux(sound.encode(heard))
            container.mux(sound.encode(None))
    return path


class Speaker:
    """Takes the place of the speech model: some words in the second scene."""

    words = WORDS

    def __init__(self, model: Path) -> None:
        assert model

    def sentences(self, path: Path, start_s: float) -> Iterator[Sentence]:
        return iter([Sentence(2.5, 3.5, self.words)] if start_s <= 2.5 else [])


def load(folder: Path) -> LanguageModel:
    return load_model(folder, folder, torch.float32)


def silently(_: object) -> None:
    """Nobody watches."""


def entries_and_bytes(store: Path) -> tuple[list[Entry], dict[str, Any], bytes]:
    """A stream as it is stored: entries, cursor, keys and values."""
    with Store.open(store, access=Access.READ) as listing:
        header = listing.manifest("s").header
    with Store.open(store, access=Access.READ, layout=header.layout, host_nbytes=1 << 20) as reader:
        manifest = reader.manifest("s")
        slots = [torch.zeros(header.layout.slot_nbytes, dtype=torch.uint8) for _ in manifest.entries]
        outcomes = reader.get([entry.key for entry in manifest.entries], slots)
    assert all(outcome.is_hit for outcome in outcomes)
    return list(manifest.entries), manifest.cursor, b"".join(slot.numpy().tobytes() for slot in slots)
