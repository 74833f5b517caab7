# SPDX-License-Identifier: Apache-2.0
"""Retention filters, each against a literal reference of its rule, and what holds for all of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import ConfigError
from kvstore.retrieval.retention.frames import DistinctTokens, FrameCarriers, NewFrames
from kvstore.retrieval.retention.received import MostReceived, SinkBuckets
from kvstore.retrieval.retention.retention import Retention
from kvstore.retrieval.tokens import LayerTokens
from tests.layer_tokens import layer_tokens

ALL: tuple[Retention, ...] = (
    DistinctTokens(0.3),
    FrameCarriers(2),
    NewFrames(0.2),
    MostReceived(),
    SinkBuckets(0.4, 3),
)
FRAME = 6


def video(num_frames: int = 8, *, seed: int = 0) -> LayerTokens:
    """Frames of 6 tokens; a text token stands before the first, and one behind the third."""
    tokens = layer_tokens(num_frames * FRAME + 2, seed=seed)
    groups = (torch.arange(num_frames * FRAME) // FRAME).tolist()
    groups = [-1, *groups[: 3 * FRAME], -1, *groups[3 * FRAME :]]
    return replace(tokens, groups=torch.tensor(groups))


def with_text(tokens: LayerTokens, ranked: list[int], budget: int) -> list[int]:
    """Text first, then what is ranked, while the budget lasts."""
    text = [place for place in range(tokens.num_tokens) if tokens.groups[place] < 0]
    return sorted([*text, *ranked][:budget])


def vectors(tokens: LayerTokens) -> dict[int, list[float]]:
    """The joined plain keys of each video token, by place."""
    return {
        place: [float(x) for head in tokens.keys[:, place] for x in head]
        for place in range(tokens.num_tokens)
        if tokens.groups[place] >= 0
    }


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def distance(one: list[float], other: list[float]) -> float:
    return 1 - sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


def frames_of(tokens: LayerTokens) -> list[list[int]]:
    found = vectors(tokens)
    return [
        [place for place in found if tokens.groups[place] == group]
        for group in sorted({*tokens.groups.tolist()} - {-1})
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [1, 9, 30, 50])
def test_distinct_tokens_are_far_from_the_mean_in_time_and_in_their_frame(alpha: float, budget: int) -> None:
    tokens = video()
    keys = vectors(tokens)
    middle = mean(list(keys.values()))
    score = {}
    for frame in frames_of(tokens):
        anchor = mean([keys[place] for place in frame])
        for place in frame:
            score[place] = alpha * distance(keys[place], middle) + (1 - alpha) * distance(keys[place], anchor)
    wanted = with_text(tokens, sorted(score, key=lambda place: -score[place]), budget)
    assert DistinctTokens(alpha).keep(tokens, budget).tolist() == wanted


@pytest.mark.parametrize("num_carriers", [1, 2, 9])
@pytest.mark.parametrize("budget", [4, 11, 18, 50])
def test_a_frame_is_carried_by_the_tokens_most_like_its_mean(num_carriers: int, budget: int) -> None:
    tokens = video()
    keys = vectors(tokens)
    frames = frames_of(tokens)
    means = [mean([keys[place] for place in frame]) for frame in frames]
    novelty = [2.0, *(distance(now, before) for before, now in itertools.pairwise(means))]
    ranked: list[int] = []
    for number in sorted(range(len(frames)), key=lambda number: -novelty[number]):
        by_likeness = sorted(frames[number], key=lambda place: distance(keys[place], means[number]))
        ranked += sorted(by_likeness[:num_carriers])
    assert FrameCarriers(num_carriers).keep(tokens, budget).tolist() == with_text(tokens, ranked, budget)


@pytest.mark.parametrize("budget", [3, 10, 50])
def test_a_frame_like_the_one_before_goes_and_the_most_looked_at_of_the_others_stay(budget: int) -> None:
    tokens = video()
    keys = tokens.keys.clone()
    keys[:, 7:13] = keys[:, 1:7] + 0.2 * keys[:, 7:13]  # frame 1 about repeats frame 0
    tokens = replace(tokens, keys=keys)
    joined = vectors(tokens)
    frames = frames_of(tokens)
    means = [mean([joined[place] for place in frame]) for frame in frames]
    likeness = [1 - distance(now, before) for before, now in itertools.pairwise(means)]
    new = [0, *(number for number, cosine in enumerate(likeness, start=1) if cosine <= 0.8)]
    assert new == [0, 2, 3, 4, 5, 6, 7]
    left = [place for number in new for place in frames[number]]
    ranked = sorted(left, key=lambda place: -float(tokens.received[:, place].sum()))
    assert NewFrames(0.8).keep(tokens, budget).tolist() == with_text(tokens, ranked, budget)


@pytest.mark.parametrize("budget", [1, 7, 50])
def test_most_received_takes_the_head_that_looked_hardest(budget: int) -> None:
    tokens = layer_tokens(40)
    score = [max(float(head[place]) for head in tokens.received) for place in range(40)]
    ranked = sorted(range(40), key=lambda place: -score[place])
    assert MostReceived().keep(tokens, budget).tolist() == sorted(ranked[:budget])


@pytest.mark.parametrize("sink_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("recent", [0, 5])
@pytest.mark.parametrize("budget", [5, 12, 20, 47, 60])
def test_sinks_and_buckets_cover_all_positions(sink_share: float, recent: int, budget: int) -> None:
    tokens = video()
    count = tokens.num_tokens
    fixed = list(range(count - recent, count))
    fixed += [place for place in range(count - recent) if tokens.groups[place] < 0]
    long = [place for place in range(count) if place not in fixed]
    room = max(0, budget - len(fixed))
    ranked = sorted(long, key=lambda place: -float(tokens.received[:, place].sum()))
    kept = ranked[: round(sink_share * room)]
    taken = {long.index(place) * room // len(long) for place in kept}
    for place in ranked:
        bucket = long.index(place) * room // len(long)
        if place not in kept and bucket not in taken and len(kept) < room:
            kept.append(place)
            taken.add(bucket)
    kept += [place for place in ranked if place not in kept][: room - len(kept)]
    wanted = sorted([*fixed, *kept][:budget])
    assert SinkBuckets(sink_share, recent).keep(tokens, budget).tolist() == wanted


@pytest.mark.parametrize("retention", ALL, ids=repr)
@settings(max_examples=20, deadline=None)
@given(num_tokens=st.integers(0, 30), group_tokens=st.integers(0, 8), budget=st.integers(1, 40), seed=st.integers(0, 9))
def test_every_filter_keeps_to_the_budget_in_order_and_alike_each_time(
    retention: Retention, num_tokens: int, group_tokens: int, budget: int, seed: int
) -> None:
    tokens = layer_tokens(num_tokens, group_tokens=group_tokens, seed=seed, first=7)
    kept = retention.keep(tokens, budget)
    assert kept.dtype == torch.int64
    assert kept.shape[0] <= budget
    assert kept.tolist() == sorted({*kept.tolist()})
    assert all(0 <= place < num_tokens for place in kept.tolist())
    assert torch.equal(kept, retention.keep(tokens, budget))
    assert bool(kept.shape[0]) == bool(num_tokens)


@pytest.mark.parametrize("retention", ALL, ids=repr)
def test_equal_tokens_keep_the_earlier_ones(retention: Retention) -> None:
    tokens = layer_tokens(24, group_tokens=24)
    same = replace(tokens, keys=torch.ones_like(tokens.keys), received=torch.ones_like(tokens.received))
    kept = retention.keep(same, 8).tolist()
    assert kept[0] == 0
    assert len(kept) == (2 if isinstance(retention, FrameCarriers) else 8)


def test_keys_that_are_stored_rotated_cannot_be_compared_by_frames() -> None:
    with pytest.raises(ConfigError, match="rotated"):
        DistinctTokens().keep(replace(video(), rotate=None), 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DistinctTokens(1.5),
        lambda: FrameCarriers(0),
        lambda: NewFrames(2.0),
        lambda: SinkBuckets(-0.1),
        lambda: SinkBuckets(0.5, -1),
    ],
)
def test_what_makes_no_sense_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        make()
