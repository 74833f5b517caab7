# SPDX-License-Identifier: Apache-2.0
"""Turns a video into a sequence of observations: what its screens show, what its speakers say, and when."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvstore.video.changes import MAX_GROUP_S, FrameGroup, group_frames
from kvstore.video.decode import probe, sample_frames

if TYPE_CHECKING:
    from kvstore.engines.pictures import Picture

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Observation:
    """What was perceived during one stretch of the video.

    Args:
        start_s: beginning, in seconds from the start of the video.
        end_s: end; the next observation starts here.
        text: paragraphs; empty when there was nothing to read or hear.
        picture: the frame itself, for a model that sees; it comes before the text.
    """

    start_s: float
    end_s: float
    text: str
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Sentence:
    """Something said.

    Args:
        start_s: when it begins, in seconds from the start of the video.
        end_s: when it ends.
        text: the words.
    """

    start_s: float
    end_s: float
    text: str


class Perception(Protocol):
    """Says what a screen shows. Called from one thread at a time, not always the same."""

    def describe(self, group: FrameGroup) -> Observation:
        """Describe the group's frame; the observation spans the group."""
        ...


class Listener(Protocol):
    """Says what is said. Called from one thread at a time, not always the same."""

    def sentences(self, path: Path, start_s: float) -> Iterator[Sentence]:
        """Yield, in order of time, the sentences that begin at or after `start_s`."""
        ...


def perceive(
    path: Path,
    perception: Perception,
    *,
    fps: float = 1.0,
    start_s: float = 0.0,
    listener: Listener | None = None,
    max_group_s: float = MAX_GROUP_S,
    lookahead: int = 4,
) -> Generator[Observation, None, None]:
    """Yield one observation per screen, with what was said while it stood; they leave no gap between them.

    To resume, pass the `end_s` of the last observation that was kept: the rest is the same as without the break.
    A thread works ahead of the caller; it ends when the generator is closed, and its errors are raised here.

    Args:
        path: the video.
        perception: reads the screens.
        fps: frames per second to look at.
        start_s: where to begin.
        listener: writes down what is said; None leaves the sound track alone.
        max_group_s: longest stretch that one observation may stand for while the picture rests.
        lookahead: observations to prepare before the caller asks for them.

    Raises:
        ConfigError: as `sample_frames`.
        MediaError: as `sample_frames`; also in the middle, when the rest of the file cannot be read.
    """
    ready: queue.Queue[Observation | BaseException | None] = queue.Queue(maxsize=max(1, lookahead))
    stopped = threading.Event()

    def offer(item: Observation | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            with closing(_observations(path, perception, fps, start_s, listener, max_group_s)) as observations:
                for observation in observations:
                    if not offer(observation):
                        return
            offer(None)
        except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
            offer(error)

    worker = threading.Thread(target=work, name="kvstore-perceive", daemon=True)
    worker.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        worker.join()


def _observations(
    path: Path, perception: Perception, fps: float, start_s: float, listener: Listener | None, max_group_s: float
) -> Generator[Observation, None, None]:
    info = probe(path)
    frames = sample_frames(path, fps, start_s)
    said = listener.sentences(path, start_s) if listener is not None and info.has_audio else iter(())
    sentence = next(said, None)
    # The last group takes all that is said after its frames.
    for group, is_last in _marking_last(group_frames(frames, end_s=info.duration_s, max_group_s=max_group_s)):
        seen = perception.describe(group)
        heard: list[str] = []
        while sentence is not None and (is_last or sentence.start_s < group.end_s):
            heard.append(sentence.text)
            sentence = next(said, None)
        paragraphs = [seen.text] if seen.text else []
        if heard:
            paragraphs.append("Spoken: " + " ".join(heard))
        yield replace(seen, text="\n\n".join(paragraphs))


def _marking_last(groups: Iterator[FrameGroup]) -> Iterator[tuple[FrameGroup, bool]]:
    held = next(groups, None)
    while held is not None:
        following = next(groups, None)
        yield held, following is None
        held = following
