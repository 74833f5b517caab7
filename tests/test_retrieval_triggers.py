# SPDX-License-Identifier: Apache-2.0
"""Triggers: when each selects, keeps, or selects for the next forward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.triggers.query_cosine import QueryCosine
from kvstore.retrieval.triggers.speculative import Speculative
from kvstore.retrieval.triggers.stride import EveryChunk, Stride
from kvstore.retrieval.triggers.trigger import Choice, EveryStep, OncePerQuestion

NORTH, EAST = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])


def heads(*each: Tensor) -> Tensor:
    """A query of these heads."""
    return torch.stack(each)


def test_a_stride_selects_at_every_nth_forward() -> None:
    query = heads(NORTH)
    choices = [Stride(3).choose(step, query, query) for step in range(1, 8)]
    keep, select = Choice.KEEP, Choice.SELECT
    assert choices == [keep, keep, select, keep, keep, select, keep]
    assert Stride(1).choose(1, query, query) is select


def test_every_chunk_selects_at_each_of_its_forwards() -> None:
    assert EveryChunk(512).num_tokens == 512
    assert EveryChunk().choose(1, heads(EAST), heads(EAST)) is Choice.SELECT


def test_a_query_that_turned_away_selects_and_its_length_does_not_count() -> None:
    # Of two heads one turned by a right angle: the mean cosine is .5.
    now, then = heads(NORTH, EAST * 7), heads(NORTH * 5, NORTH)
    assert QueryCosine(0.49).choose(1, now, then) is Choice.KEEP
    assert QueryCosine(0.51).choose(1, now, then) is Choice.SELECT
    assert QueryCosine(1.0).choose(1, heads(-EAST), heads(EAST)) is Choice.SELECT
    assert QueryCosine(-1.0).choose(1, heads(-EAST), heads(EAST)) is Choice.KEEP


def test_the_mean_is_over_heads_as_in_the_paper() -> None:
    chance = torch.Generator().manual_seed(0)
    now, then = torch.randn(2, 5, 8, generator=chance)
    cosines = [
        sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)
        for x, y in zip(now.tolist(), then.tolist(), strict=True)
    ]
    mean = sum(cosines) / 5
    assert QueryCosine(mean - 1e-4).choose(1, now, then) is Choice.KEEP
    assert QueryCosine(mean + 1e-4).choose(1, now, then) is Choice.SELECT


def test_speculation_selects_for_the_next_forward_unless_its_correction_fires() -> None:
    speculative = Speculative(QueryCosine(0.5))
    assert speculative.choose(1, heads(NORTH), heads(NORTH)) is Choice.SELECT_NEXT
    assert speculative.choose(1, heads(NORTH), heads(EAST)) is Choice.SELECT
    assert Speculative(OncePerQuestion()).choose(9, heads(NORTH), heads(EAST)) is Choice.SELECT_NEXT
    assert Speculative(EveryStep()).choose(9, heads(NORTH), heads(NORTH)) is Choice.SELECT


@pytest.mark.parametrize("number", [0, -1])
def test_counts_below_one_are_refused(number: int) -> None:
    with pytest.raises(ConfigError):
        Stride(number)
    with pytest.raises(ConfigError):
        EveryChunk(number)


@pytest.mark.parametrize("threshold", [-1.1, 1.1, float("nan")])
def test_a_bound_that_no_cosine_can_have_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError):
        QueryCosine(threshold)
