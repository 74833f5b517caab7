# SPDX-License-Identifier: Apache-2.0
"""Small pictures of moments of a video, as data URIs that a page can carry in itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from kvstore.video.decode import sample_frames

_JPEG_QUALITY = 62


class Thumbnails:
    """Pictures of one video, decoded when asked for and kept.

    Args:
        video: the file.
    """

    def __init__(self, video: Path) -> None:
        self._video = video
        self._made: dict[tuple[float, int], str] = {}

    def __call__(self, time_s: float, width: int) -> str:
        """The first picture at or after a time, as a JPEG data URI; an empty string after the last picture.

        Args:
            time_s: seconds from the start of the video.
            width: pixels; the height follows.
        """
        wanted = (time_s, width)
        if wanted not in self._made:
            frame = next(sample_frames(self._video, fps=1.0, start_s=time_s), None)
            self._made[wanted] = "" if frame is None else _jpeg(Image.fromarray(frame.rgb()), width)
        return self._made[wanted]


def _jpeg(picture: Image.Image, width: int) -> str:
    height = max(round(picture.height * width / picture.width), 1)
    sink = io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(sink, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
