# SPDX-License-Identifier: Apache-2.0
"""kvstore/video/changes.py: one group per screen, the same groups wherever one begins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("av")

from kvstore.video.changes import MAX_GROUP_S, group_frames
from kvstore.video.decode import THUMBNAIL_SHAPE, Frame, probe, sample_frames


class _Recording(Protocol):
    video: Path
    truth: dict[str, Any]


def _frame(time_s: float, level: float) -> Frame:
    thumbnail = np.full(THUMBNAIL_SHAPE, level, dtype=np.uint8)

    def rgb() -> NDArray[np.uint8]:
        return np.full((9, 16, 3), level, dtype=np.uint8)

    return Frame(time_s, thumbnail, rgb)


def _frames(*levels: float) -> list[Frame]:
    return [_frame(float(time_s), level) for time_s, level in enumerate(levels)]


def _spans(frames: list[Frame] | Iterator[Frame], end_s: float, **options: float) -> list[tuple[float, float, float]]:
    """Start, end and time of the chosen frame of every group."""
    return [(g.start_s, g.end_s, g.frame.time_s) for g in group_frames(frames, end_s=end_s, **options)]


def test_no_frames_make_no_groups() -> None:
    assert _spans([], 10.0) == []


def test_one_frame_makes_one_group() -> None:
    assert _spans(_frames(50), 7.0) == [(0.0, 7.0, 0.0)]


def test_a_new_screen_begins_a_group_and_the_last_frame_at_rest_stands_for_it() -> None:
    assert _spans(_frames(50, 50, 50, 90, 90), 5.0) == [(0.0, 3.0, 2.0), (3.0, 5.0, 4.0)]


def test_motion_belongs_to_the_screen_that_it_leads_to() -> None:
    assert _spans(_frames(50, 50, 60, 70, 80, 80, 80), 7.0) == [(0.0, 2.0, 1.0), (2.0, 7.0, 6.0)]


def test_small_changes_stay_in_the_group() -> None:
    assert _spans(_frames(50, 51, 50, 51, 50), 5.0) == [(0.0, 5.0, 4.0)]


def test_a_slow_drift_is_noticed_against_the_first_screen() -> None:
    assert len(_spans(_frames(*range(50, 60)), 10.0)) > 1


def test_what_never_rests_is_cut_every_few_seconds() -> None:
    spans = _spans(_frames(*([50, 90] * 10)), 20.0)
    assert {end - start for start, end, _ in spans} == {4.0}


def test_a_still_picture_is_looked_at_again() -> None:
    spans = _spans(_frames(*([50] * 300)), 300.0)
    assert [start for start, _, _ in spans] == [0.0, MAX_GROUP_S, 2 * MAX_GROUP_S]


def test_groups_equal_the_recorded_screens(recording: _Recording) -> None:
    spans = _spans(sample_frames(recording.video, fps=1), probe(recording.video).duration_s)
    assert [start for start, _, _ in spans] == [screen["start_s"] for screen in recording.truth["screens"]]


def test_the_chosen_frames_are_at_rest(recording: _Recording) -> None:
    # The recorder's pointer rests in the corner only for the last seconds of a screen.
    for _, end_s, chosen_s in _spans(sample_frames(recording.video, fps=2), recording.truth["duration_s"]):
        assert end_s - 2 <= chosen_s < end_s


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(st.sampled_from([50, 51, 60, 90, 200]), min_size=1, max_size=60),
    max_group_s=st.sampled_from([3.0, 10.0, 120.0]),
)
def test_frames_that_begin_at_any_group_give_the_same_rest(levels: list[int], max_group_s: float) -> None:
    frames = _frames(*levels)
    end_s = float(len(levels))
    whole = _spans(frames, end_s, max_group_s=max_group_s)
    assert [end for _, end, _ in whole[:-1]] == [start for start, _, _ in whole[1:]]
    for number, (start_s, _, _) in enumerate(whole):
        rest = itertools.dropwhile(lambda frame: frame.time_s < start_s, frames)  # noqa: B023 - used at once
        assert _spans(rest, end_s, max_group_s=max_group_s) == whole[number:]
