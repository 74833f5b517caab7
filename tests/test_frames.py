# SPDX-License-Identifier: Apache-2.0
"""Units that end where frames and scenes do, whatever way a stream is fed."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import ConfigError
from kvstore.retrieval.segmenters.frames import Frames, Scenes
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Segmenter
from tests.layer_tokens import layer_tokens


def stream_of(groups: list[int], *, seed: int = 0, first: int = 0) -> LayerTokens:
    """A stream whose frames show one of two things, and noise."""
    tokens = layer_tokens(len(groups), seed=seed, first=first)
    shown = torch.tensor(groups) // 3 % 2
    keys = 0.3 * tokens.keys + torch.eye(16)[:2][shown]
    return dataclasses.replace(tokens, keys=keys, groups=torch.tensor(groups))


def frames(sizes: list[int], texts: set[int]) -> list[int]:
    """Group of each token: frames of `sizes` tokens, those in `texts` are text instead."""
    return [-1 if number in texts else number for number, size in enumerate(sizes) for _ in range(size)]


def fed(segmenter: Segmenter, tokens: LayerTokens, steps: list[int]) -> list[list[int]]:
    """Units of a stream that comes in steps of so many tokens; what is left is offered again, as a memory does."""
    found: list[list[int]] = []
    start = 0
    for end in sorted({*steps, tokens.num_tokens}):
        (units,) = segmenter.cut(tokens.part(start, end), is_end=end == tokens.num_tokens)
        found += [units.tokens[low:high].tolist() for low, high in pairwise(units.starts.tolist())]
        start += units.num_tokens
    return found


def literal_frames(groups: list[int], page: int, first: int) -> list[list[int]]:
    units: list[list[int]] = []
    for token, group in enumerate(groups):
        is_new = token == 0 or group != groups[token - 1] or (group < 0 and len(units[-1]) == page)
        if is_new:
            units.append([])
        units[-1].append(first + token)
    return units


def literal_scenes(tokens: LayerTokens, segmenter: Scenes) -> list[list[int]]:
    groups: list[int] = tokens.groups.tolist()
    units: list[list[int]] = []
    num_frames, before = 0, None
    for unit in literal_frames(groups, segmenter.page_tokens, 0):
        if groups[unit[0]] < 0:
            num_frames, before = 0, None
            units.append(unit)
            continue
        mean = tokens.keys[:, unit].mean(1).flatten()
        differs = before is not None and float(torch.cosine_similarity(mean, before, dim=0)) < segmenter.threshold
        is_cut = num_frames == segmenter.most_frames or (differs and num_frames >= segmenter.least_frames)
        if num_frames == 0 or is_cut:
            units.append([])
            num_frames = 0
        units[-1] += unit
        num_frames, before = num_frames + 1, mean
    return units


STREAMS = st.tuples(
    st.lists(st.integers(1, 12), min_size=1, max_size=20), st.sets(st.integers(0, 20), max_size=6),
    st.lists(st.integers(0, 150), max_size=6), st.integers(0, 9),
)  # fmt: skip
Stream = tuple[list[int], set[int], list[int], int]


@settings(max_examples=60, deadline=None)
@given(STREAMS)
def test_a_frame_is_a_unit_and_text_is_cut_to_pages_however_the_stream_is_fed(stream: Stream) -> None:
    sizes, texts, steps, first = stream
    groups = frames(sizes, texts)
    steps = [step for step in steps if step < len(groups)]
    assert fed(Frames(5), stream_of(groups, first=first), steps) == literal_frames(groups, 5, first)


@settings(max_examples=60, deadline=None)
@given(STREAMS, st.integers(1, 4), st.integers(0, 4))
def test_scenes_end_where_frames_differ_however_the_stream_is_fed(stream: Stream, least: int, more: int) -> None:
    sizes, texts, steps, seed = stream
    groups = frames(sizes, texts)
    steps = [step for step in steps if step < len(groups)]
    segmenter = Scenes(0.6, least, least + more, page_tokens=5)
    tokens = stream_of(groups, seed=seed)
    assert fed(segmenter, tokens, steps) == literal_scenes(tokens, segmenter)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 60), st.lists(st.integers(0, 60), max_size=6))
def test_pages_are_the_same_however_the_stream_is_fed(page: int, num_tokens: int, steps: list[int]) -> None:
    tokens = layer_tokens(num_tokens, first=7)
    wanted = [list(range(7 + low, 7 + min(low + page, num_tokens))) for low in range(0, num_tokens, page)]
    assert fed(Pages(page), tokens, [step for step in steps if step < num_tokens]) == wanted


def test_the_last_frame_waits_until_it_is_known_to_be_whole() -> None:
    tokens = stream_of(frames([4, 4, 4], set()))
    (units,) = Frames().cut(tokens, is_end=False)
    assert units.sizes.tolist() == [4, 4]
    (units,) = Frames().cut(stream_of(frames([4, 4, 1], {2})), is_end=False)
    assert units.sizes.tolist() == [4, 4]


def test_nothing_is_cut_from_no_tokens() -> None:
    for segmenter in (Frames(), Scenes()):
        (units,) = segmenter.cut(layer_tokens(0), is_end=True)
        assert (units.num_units, units.num_tokens) == (0, 0)


def test_impossible_figures_are_refused() -> None:
    for least, most in ((0, 4), (5, 4)):
        with pytest.raises(ConfigError, match="scenes of"):
            Scenes(least_frames=least, most_frames=most)
    for make in (Frames, Scenes):
        with pytest.raises(ConfigError, match="pages of 0 tokens"):
            make(page_tokens=0)


def test_scenes_need_keys_before_rope() -> None:
    with pytest.raises(ConfigError, match="stored rotated"):
        Scenes().cut(dataclasses.replace(layer_tokens(8, group_tokens=2), rotate=None), is_end=True)
