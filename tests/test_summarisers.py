# SPDX-License-Identifier: Apache-2.0
"""Summaries and the queries lifted to them: their inner product is the formula of the paper; bounds are never low."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.scorers.bound import Bound, SphereBound
from kvstore.retrieval.scorers.dot import Constant, Cosine, Dot
from kvstore.retrieval.summarisers.bounds import CuboidMean, MinMax
from kvstore.retrieval.summarisers.mean import Mean, Received
from kvstore.retrieval.summarisers.normalised import Normalised
from kvstore.retrieval.summarisers.sphere import Outlier, Sphere
from kvstore.retrieval.tokens import LayerTokens, Space
from kvstore.retrieval.units import Units
from kvstore.retrieval.view import Pool, Scorer, Summariser, View
from tests.layer_tokens import layer_query, layer_tokens

GEOMETRIES = st.tuples(
    st.sampled_from([1, 2, 3]), st.sampled_from([1, 3, 8, 16]), st.sampled_from([32, 64, 128, 256]),
    st.lists(st.integers(1, 12), min_size=1, max_size=6), st.booleans(), st.integers(0, 99),
)  # fmt: skip
Geometry = tuple[int, int, int, list[int], bool, int]


def case(geometry: Geometry) -> tuple[LayerTokens, Tensor, list[Units]]:
    """Tokens, queries `[kv_heads, group, 1, dim]`, and units: runs, or any sets of tokens for each head."""
    kv_heads, group, dim, sizes, is_scattered, seed = geometry
    tokens = layer_tokens(sum(sizes), kv_heads=kv_heads, dim=dim, first=3, seed=seed)
    query = layer_query(1, kv_heads=kv_heads, group=group, dim=dim, seed=seed + 1).query
    runs = Units.runs(3, sizes)
    if not is_scattered:
        return tokens, query, [runs]
    chance = torch.Generator().manual_seed(seed)
    heads = []
    for _ in range(kv_heads):
        parts = (3 + torch.randperm(sum(sizes), generator=chance)).split(sizes)
        heads.append(Units(torch.cat([part.sort().values for part in parts]), runs.starts))
    return tokens, query, heads


def scores_of(
    summariser: Summariser, scorer: Scorer, geometry: Geometry
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per head and unit: the score, the queries of the group, the unit's keys, and what they received."""
    tokens, query, units = case(geometry)
    view = View(summariser, scorer, Space.PLAIN, pool=Pool.LAST)
    summaries = view.summaries(tokens, units)
    assert summaries.shape == (geometry[0], len(geometry[3]), summariser.width(geometry[2]))
    # One lifted query asks for all heads of the group.
    scores = torch.bmm(scorer.lift(query).sum(1), summaries.transpose(1, 2))[:, 0]
    found = []
    for head in range(geometry[0]):
        own = units[head % len(units)]
        for unit, inside in enumerate((own.tokens - 3).split(geometry[3])):
            received = tokens.received[head, inside]
            found.append((scores[head, unit], query[head, :, 0], tokens.keys[head, inside], received))
    return found


@settings(max_examples=25, deadline=None)
@given(GEOMETRIES, st.booleans())
def test_a_bound_is_never_below_a_logit(geometry: Geometry, is_sphere: bool) -> None:
    pair: tuple[Summariser, Scorer] = (Sphere(), SphereBound()) if is_sphere else (MinMax(), Bound())
    for score, queries, keys, _ in scores_of(*pair, geometry):
        logits = queries @ keys.T
        # Summed over the heads of a group, each bounded by itself.
        assert float(score) >= float(logits.amax(1).sum()) - 1e-3 * float(logits.abs().sum())


@settings(max_examples=25, deadline=None)
@given(GEOMETRIES)
def test_boxes_score_what_the_papers_say(geometry: Geometry) -> None:
    for summariser in (MinMax(), CuboidMean()):
        for score, queries, keys, _ in scores_of(summariser, Bound(), geometry):
            upper, lower = keys.amax(0), keys.amin(0)
            if isinstance(summariser, CuboidMean):
                middle = (upper + lower) / 2
                spread = (keys - middle).abs().mean(0)
                upper, lower = middle + spread, middle - spread
            wanted = torch.maximum(queries * upper, queries * lower).sum()
            torch.testing.assert_close(score, wanted, atol=1e-3, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(GEOMETRIES, st.integers(1, 6))
def test_vectors_score_what_the_papers_say(geometry: Geometry, best: int) -> None:
    for score, queries, keys, _ in scores_of(Mean(), Dot(), geometry):
        torch.testing.assert_close(score, (queries @ keys.mean(0)).sum(), atol=1e-3, rtol=1e-4)
    for score, queries, keys, _ in scores_of(Normalised(Mean()), Cosine(), geometry):
        wanted = torch.cosine_similarity(queries, keys.mean(0), dim=1).sum()
        torch.testing.assert_close(score, wanted, atol=1e-4, rtol=1e-4)
    for score, queries, keys, received in scores_of(Received(best), Dot(), geometry):
        top = sorted(range(len(keys)), key=lambda token: -float(received[token]))[:best]
        torch.testing.assert_close(score, (queries @ keys[top].mean(0)).sum(), atol=1e-3, rtol=1e-4)
    for score, queries, keys, _ in scores_of(Sphere(), SphereBound(), geometry):
        centre = keys.mean(0)
        radius = max(float((key - centre).norm()) for key in keys)
        wanted = (queries @ centre).sum() + queries.norm(dim=1).sum() * radius
        torch.testing.assert_close(score, wanted, atol=1e-3, rtol=1e-4)
    for score, queries, keys, _ in scores_of(Outlier(), Constant(), geometry):
        lowest = min(float(torch.cosine_similarity(key, keys.mean(0), dim=0)) for key in keys)
        torch.testing.assert_close(score, torch.tensor(-lowest * len(queries)), atol=1e-3, rtol=1e-4)


def test_of_tokens_that_received_alike_the_earlier_ones_stand_for_a_unit() -> None:
    tokens = dataclasses.replace(layer_tokens(6), received=torch.tensor([[1, 2, 2, 2, 0, 0.0]]).expand(2, -1))
    found = View(Received(2), Dot(), Space.PLAIN).summaries(tokens, [Units.runs(0, [6])])
    torch.testing.assert_close(found[:, 0], tokens.keys[:, 1:3].mean(1))


def test_a_mean_of_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Received(0)
