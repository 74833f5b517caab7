# SPDX-License-Identifier: Apache-2.0
"""Groups the frames that show the same screen, so that each screen is looked at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from kvstore.video.decode import Frame

CHANGE_LEVEL = 2.0
"""Mean absolute difference of two thumbnails, in grey levels (0 to 255), from which they show different screens.

A moving pointer makes 0.1 and coding noise 0.3; a new page of text makes 8 or more."""
MAX_GROUP_S = 120.0
"""A picture that stands still is looked at again after this time."""
_MAX_MOTION_S = 4.0


@dataclass(frozen=True, slots=True)
class FrameGroup:
    """Consecutive frames that show one screen.

    Args:
        start_s: time of its first frame.
        end_s: time of the next group's first frame, or the end of the video.
        frame: its last frame at rest: complete, and not in mid-scroll.
    """

    start_s: float
    end_s: float
    frame: Frame


def group_frames(frames: Iterable[Frame], *, end_s: float, max_group_s: float = MAX_GROUP_S) -> Iterator[FrameGroup]:
    """Yield the groups of a run of frames; they leave no gap between them.

    A group begins with the first frame that differs from the screen before it, in motion (a scroll, a fade) or not.
    It takes its screen from the first pair of alike frames; what never rests is cut every few seconds. A group
    depends on nothing before its own first frame: frames that begin where some group begins give the same groups
    from there on. Holds two frames at a time.

    Args:
        frames: in order of time, such as `sample_frames` yields.
        end_s: end of the last group, when later than its last frame.
        max_group_s: longest time from a group's first frame to its last.
    """
    start_s = 0.0
    previous: Frame | None = None
    screen: Frame | None = None
    rested: Frame | None = None
    for frame in frames:
        if previous is None:
            start_s, previous = frame.time_s, frame
            continue
        is_like_previous = _difference(frame, previous) < CHANGE_LEVEL
        age_s = frame.time_s - start_s
        if screen is None:
            is_new = age_s >= _MAX_MOTION_S and not is_like_previous
        else:
            is_new = age_s >= max_group_s or _difference(frame, screen) >= CHANGE_LEVEL
        if is_new:
            yield FrameGroup(start_s, frame.time_s, rested or previous)
            start_s, screen, rested = frame.time_s, None, None
        elif is_like_previous:
            screen = screen or frame
            rested = frame
        previous = frame
    if previous is not None:
        yield FrameGroup(start_s, max(end_s, previous.time_s), rested or previous)


def _difference(one: Frame, other: Frame) -> float:
    """Mean absolute difference of the thumbnails, in grey levels."""
    return float(np.abs(one.thumbnail.astype(np.int16) - other.thumbnail).mean())
