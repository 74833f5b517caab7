# SPDX-License-Identifier: Apache-2.0
"""Clusters of keys: every token in one, none empty, the same however the stream is fed, and like keys together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.segmenters.clusters import Clusters, spherical_kmeans
from kvstore.retrieval.tokens import LayerTokens, Space
from tests.layer_tokens import layer_tokens


def clusters_of(tokens: LayerTokens, segmenter: Clusters) -> list[list[list[int]]]:
    found = segmenter.cut(tokens, is_end=True)
    return [[part.tolist() for part in each.tokens.tensor_split(each.starts[1:-1])] for each in found]


def literal_kmeans(keys: Tensor, num_clusters: int, num_iterations: int) -> list[int]:
    """Spherical k-means of one head that starts from evenly spaced tokens."""
    rows = [row / row.norm() for row in keys - keys.mean(0)]
    centres = [rows[number * len(rows) // num_clusters] for number in range(num_clusters)]
    for _ in range(num_iterations):
        cluster = [max(range(num_clusters), key=lambda number: float(row @ centres[number])) for row in rows]
        for number in range(num_clusters):
            mine = [row for row, each in zip(rows, cluster, strict=True) if each == number]
            total = torch.stack(mine).sum(0)
            centres[number] = total / total.norm()
    return cluster


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 200),
    kv_heads=st.integers(1, 4),
    dim=st.sampled_from([2, 16, 64]),
    average=st.integers(1, 20),
    num_kinds=st.integers(1, 300),
    first=st.integers(0, 50),
)
def test_every_token_is_in_one_cluster_and_no_cluster_is_empty(
    num_tokens: int, kv_heads: int, dim: int, average: int, num_kinds: int, first: int
) -> None:
    tokens = layer_tokens(num_tokens, kv_heads=kv_heads, dim=dim, first=first)
    # Few kinds of keys make far fewer directions than there are clusters.
    tokens = dataclasses.replace(tokens, keys=tokens.keys[:, torch.arange(num_tokens) % num_kinds], rotate=None)
    heads = clusters_of(tokens, Clusters(average, segment_tokens=64))
    assert len(heads) == kv_heads
    lengths = [64] * (num_tokens // 64) + [num_tokens % 64] * (num_tokens % 64 > 0)
    for clusters in heads:
        assert len(clusters) == sum(-(-length // average) for length in lengths)
        assert all(clusters)
        assert all(cluster == sorted(cluster) for cluster in clusters)
        assert sorted(token for cluster in clusters for token in cluster) == list(range(first, first + num_tokens))


def test_clusters_are_those_of_spherical_k_means_written_out() -> None:
    keys = torch.randn(3, 120, 8, generator=torch.Generator().manual_seed(2)) + 5
    found = spherical_kmeans(keys, 8, 4)
    assert [head.tolist() for head in found] == [literal_kmeans(head, 8, 4) for head in keys]


def test_like_keys_are_together_wherever_they_stand() -> None:
    directions = torch.eye(16)[:4] * 10
    kind = torch.arange(64) * 7 // 16 % 4
    tokens = layer_tokens(64)
    keys = (directions[kind] + 0.1 * tokens.keys[0])[None].expand(2, -1, -1)
    for clusters in clusters_of(dataclasses.replace(tokens, keys=keys), Clusters(16, 64, space=Space.PLAIN)):
        assert sorted(clusters) == sorted((kind == each).nonzero()[:, 0].tolist() for each in range(4))


def test_what_all_keys_have_in_common_changes_no_cluster() -> None:
    keys = torch.randn(2, 96, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(spherical_kmeans(keys, 6, 5), spherical_kmeans(keys + torch.arange(16.0), 6, 5))


def test_a_segment_is_held_back_until_it_is_full() -> None:
    segmenter = Clusters(8, segment_tokens=64)
    assert [each.num_tokens for each in segmenter.cut(layer_tokens(63), is_end=False)] == [0, 0]
    whole = segmenter.cut(layer_tokens(64), is_end=False)
    assert [(each.num_tokens, each.num_units) for each in whole] == [(64, 8), (64, 8)]
    more = segmenter.cut(layer_tokens(100), is_end=False)
    assert torch.equal(more[0].tokens, whole[0].tokens)


@pytest.mark.parametrize("figures", [(0, 64, 5), (65, 64, 5), (16, 64, 0)])
def test_impossible_figures_are_refused(figures: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="cluster"):
        Clusters(*figures)
