# SPDX-License-Identifier: Apache-2.0
"""The words of a video without a stream: what its screens show and its speakers say, as token ids."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from kvstore.video.assets import WHISPER_TINY_EN, fetch
from kvstore.video.decode import probe
from kvstore.video.ocr import ScreenReader
from kvstore.video.perception import perceive
from kvstore.video.prompt import words_of
from kvstore.video.speech import Transcriber


def read_words(video: Path, encode: Callable[[str], list[int]], num_tokens: int) -> list[int]:
    """Read a video until it has given enough words.

    Args:
        video: the file.
        encode: the tokenizer.
        num_tokens: where to stop.

    Returns:
        Token ids as an ingest would feed them, `num_tokens` or more; fewer when the video has no more.

    Raises:
        MediaError: not a readable video.
    """
    listener = Transcriber(fetch(WHISPER_TINY_EN)) if probe(video).has_audio else None
    ids: list[int] = []
    with closing(perceive(video, ScreenReader(), listener=listener)) as observations:
        for observation in observations:
            if observation.text:
                ids += encode(words_of(observation.start_s, observation.text))
            if len(ids) >= num_tokens:
                break
    return ids
