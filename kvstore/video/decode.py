# SPDX-License-Identifier: Apache-2.0
"""Opens videos and yields their frames and sound in order, in bounded memory. The only importer of `av`."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError, MediaError
from kvstore.extras import missing_dependency

try:
    import av
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Disposition, Stream
    from av.video.stream import VideoStream
except ImportError as error:
    raise missing_dependency("av", "reading a video") from error

AnyFrame = TypeVar("AnyFrame", av.VideoFrame, av.AudioFrame)

_LOG = logging.getLogger(__name__)

AUDIO_RATE = 16_000
"""Samples per second of everything that `audio_chunks` yields."""
THUMBNAIL_SHAPE = (90, 160)
"""Rows and columns of `Frame.thumbnail`."""

_DIGEST_NBYTES = 1 << 20
_MAX_PIXELS = 1 << 26
_DECODE_THREADS = 2
_MAX_DAMAGED = 10_000
_EPSILON_S = 1e-6
_NOT_VIDEO = frozenset({"tty", "ass", "srt", "webvtt"})
"""Demuxers that draw text files; nobody means those."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a container says about its video.

    Args:
        duration_s: length in seconds, of the longest stream; 0.0 when the container does not say.
        fps: mean frames per second; 0.0 when the container does not say.
        width: pixels.
        height: pixels.
        has_audio: whether there is a sound track.
        content_id: 32 hex digits made of the file's size and its first and last MiB: recognises the same file.
    """

    duration_s: float
    fps: float
    width: int
    height: int
    has_audio: bool
    content_id: str


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of the video, in colour only when asked for: most frames are only compared.

    Args:
        time_s: when it appears, in seconds from the start of the video.
        thumbnail: `THUMBNAIL_SHAPE` uint8, grey.
        rgb: call it for the whole picture, [height, width, 3] uint8.
    """

    time_s: float
    thumbnail: NDArray[np.uint8]
    rgb: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """A stretch of sound.

    Args:
        start_s: time of its first sample, in seconds from the start of the video.
        samples: [num_samples] float32, mono, `AUDIO_RATE`, -1 to 1.
    """

    start_s: float
    samples: NDArray[np.float32]


def probe(path: Path) -> VideoInfo:
    """Read what the container says, and decode one frame to be sure that there is one.

    Raises:
        MediaError: no such file, not a video, no video stream, or no frame in it.
    """
    with _opened(path) as container:
        stream = _video_stream(container, path)
        if next(_frames(container, stream, stream.decode, path), None) is None:
            raise MediaError(f"{path}: the video stream holds no frame that can be decoded")
        rate = stream.average_rate
        return VideoInfo(
            duration_s=_duration_s(container, stream),
            fps=float(rate) if rate is not None else 0.0,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            has_audio=bool(container.streams.audio),
            content_id=_content_id(path),
        )


def sample_frames(path: Path, fps: float, start_s: float = 0.0) -> Iterator[Frame]:
    """Yield the first frame of every 1/fps seconds, from `start_s` on, in order of time.

    The grid of 1/fps seconds starts with the video whatever `start_s` is, so a later start yields the rest of the
    very same frames. Damaged packets and pictures are left out and counted in the log.

    Args:
        path: the video.
        fps: frames per second to yield at most; a video with fewer yields all of its frames.
        start_s: frames before this time are left out.

    Raises:
        ConfigError: `fps` is not positive and finite, or `start_s` is negative or not finite.
        MediaError: as `probe`.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ConfigError(f"fps is {fps}; it must be a positive number of frames per second")
    if not (math.isfinite(start_s) and start_s >= 0):
        raise ConfigError(f"start_s is {start_s}; it must be a time in seconds from the start of the video")
    # The grid cell that holds start_s may begin, and have its frame, before it.
    cell_start_s = max(0.0, math.floor(start_s * fps + _EPSILON_S) / fps)
    last_cell = -1
    with _opened(path) as container:
        stream = _video_stream(container, path)
        origin_s = _origin_s(container)
        num_decoded = 0
        for frame in _frames_from(container, stream, path, cell_start_s + origin_s):
            num_decoded += 1
            time_s = frame.time - origin_s
            cell = math.floor(time_s * fps + _EPSILON_S)
            if cell <= last_cell or time_s < cell_start_s - _EPSILON_S:
                continue
            last_cell = cell
            if time_s >= start_s - _EPSILON_S:
                yield Frame(time_s, _thumbnail(frame), partial(_rgb, frame))
        if num_decoded == 0:
            raise MediaError(f"{path}: the video stream holds no frame that can be decoded")


def audio_chunks(path: Path, start_s: float = 0.0) -> Iterator[AudioChunk]:
    """Yield the first sound track from about `start_s` on (never later), in order of time; nothing if there is none.

    Raises:
        MediaError: no such file, or nothing that can be opened as media.
    """
    with _opened(path) as container:
        if not container.streams.audio:
            return
        stream = container.streams.audio[0]
        origin_s = _origin_s(container)
        if start_s > 0:
            container.seek(int((start_s + origin_s) * av.time_base))
        resampler = av.AudioResampler(format="flt", layout="mono", rate=AUDIO_RATE)
        for frame in _frames(container, stream, stream.decode, path):
            time_s = (frame.time or 0.0) - origin_s
            for piece in resampler.resample(frame):
                yield AudioChunk(time_s, piece.to_ndarray()[0])
                time_s += piece.samples / AUDIO_RATE


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    if not path.is_file():
        raise MediaError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    try:
        # A hostile playlist must not reach the network.
        container = av.open(str(path.resolve()), options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot be opened as a video: {error.strerror}") from error
    with container:
        if container.format.name in _NOT_VIDEO:
            raise MediaError(f"{path}: not a video but {container.format.long_name}")
        yield container


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError(f"{path}: no video stream (only {', '.join(s.type for s in container.streams) or 'nothing'})")
    stream = streams[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if not 0 < width * height <= _MAX_PIXELS:
        raise MediaError(f"{path}: frames of {width} x {height} pixels; 1 to {_MAX_PIXELS} pixels can be read")
    stream.codec_context.thread_count = _DECODE_THREADS
    return stream


def _frames_from(container: InputContainer, stream: VideoStream, path: Path, from_s: float) -> Iterator[av.VideoFrame]:
    """Decode from the last key frame at or before `from_s` (container time)."""
    if from_s > _origin_s(container) and stream.time_base is not None:
        container.seek(int(from_s / stream.time_base), stream=stream)
        frames = _frames(container, stream, stream.decode, path)
        first = next(frames, None)
        if first is not None and first.time <= from_s + _EPSILON_S:
            yield first
            yield from frames
            return
        # Containers without an index may land late: start over, so that no frame is lost.
        container.seek(0)
    yield from _frames(container, stream, stream.decode, path)


def _frames(
    container: InputContainer, stream: Stream, decode: Callable[[Packet[Any]], list[AnyFrame]], path: Path
) -> Iterator[AnyFrame]:
    """Decode the stream from where the container stands, leaving out what is damaged."""
    num_damaged = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            frames = decode(packet) if packet is not None else []
        except av.FFmpegError as error:
            _LOG.debug("%s: damaged packet: %s", path, error)
            num_damaged += 1
            if num_damaged > _MAX_DAMAGED:
                raise MediaError(f"{path}: more than {_MAX_DAMAGED} damaged packets; last: {error}") from error
            continue
        if packet is None:
            break
        for frame in frames:
            if frame.is_corrupt or frame.pts is None:
                num_damaged += 1
            else:
                yield frame
    if num_damaged:
        _LOG.warning("%s: %d damaged packets or frames of stream %d left out", path, num_damaged, stream.index)


def _thumbnail(frame: av.VideoFrame) -> NDArray[np.uint8]:
    height, width = THUMBNAIL_SHAPE
    small = frame.reformat(width=width, height=height, format="gray", interpolation="AREA")
    return np.asarray(small.to_ndarray(), dtype=np.uint8)


def _rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def _origin_s(container: InputContainer) -> float:
    """Time stamp of the start: some containers do not begin at zero."""
    return (container.start_time or 0) / av.time_base


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    if container.duration is not None:
        return container.duration / av.time_base
    return float((stream.duration or 0) * (stream.time_base or 0))


def _content_id(path: Path) -> str:
    nbytes = path.stat().st_size
    digest = hashlib.blake2b(nbytes.to_bytes(8, "little"), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(_DIGEST_NBYTES))
        file.seek(max(0, nbytes - _DIGEST_NBYTES))
        digest.update(file.read(_DIGEST_NBYTES))
    return digest.hexdigest()
