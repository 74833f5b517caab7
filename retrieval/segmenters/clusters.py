# SPDX-License-Identifier: Apache-2.0
"""Clusters: tokens with keys of one direction, wherever they stand, for each KV head by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.tokens import LayerTokens, Space
from kvstore.retrieval.units import Units

# Similarities of so many tokens at a time: they stay in the cache of a core, and memory stays small.
_TOKENS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Clusters:
    """Spherical k-means, segment by segment.

    The keys of a segment are centred first, because what they have in common moves all logits alike. It starts from
    evenly spaced tokens, so the same keys always give the same clusters; from the means of equal runs it finds worse
    ones. Every head of a segment has a cluster for each `average_tokens` tokens, rounded up, and none is empty. The
    last segment may be shorter at the end.

    Source: RetroInfer (arXiv:2505.02922), whose segments hold 8192 tokens of a prompt and 1024 generated ones; LouisKV
    (arXiv:2510.11292) clusters a whole prompt.

    Args:
        average_tokens: tokens of a cluster, on average.
        segment_tokens: tokens that are clustered together; a long segment finds better clusters, takes longer per
            token, and holds its tokens back until it is full.
        num_iterations: rounds of k-means.
        space: where keys are compared.

    Raises:
        ConfigError: a figure is not positive, or a cluster is larger than a segment.
    """

    average_tokens: int = 16
    segment_tokens: int = 2048
    num_iterations: int = 4
    space: Space = Space.ROTATED

    def __post_init__(self) -> None:
        if not 1 <= self.average_tokens <= self.segment_tokens or self.num_iterations < 1:
            raise ConfigError(
                f"clusters of {self.average_tokens} of {self.segment_tokens} tokens in {self.num_iterations} rounds; "
                "all must be positive, and a cluster no larger than its segment"
            )

    def cut(self, tokens: LayerTokens, *, is_end: bool) -> Sequence[Units]:
        """See `Segmenter`."""
        whole, rest = divmod(tokens.num_tokens, self.segment_tokens)
        lengths = [self.segment_tokens] * whole + [rest] * (is_end and rest > 0)
        if not lengths:
            return [Units.runs(tokens.first, [])] * tokens.keys.shape[0]
        keys = tokens.part(0, sum(lengths)).in_space(self.space)
        orders, sizes, first = [], [], tokens.first
        for segment in keys.split(lengths, dim=1):
            num_clusters = -(-segment.shape[1] // self.average_tokens)
            cluster = spherical_kmeans(segment, num_clusters, self.num_iterations)
            orders.append(cluster.argsort(dim=1, stable=True) + first)
            sizes.append(torch.zeros(keys.shape[0], num_clusters, dtype=torch.int64))
            sizes[-1].scatter_add_(1, cluster, torch.ones_like(cluster))
            first += segment.shape[1]
        starts = torch.cat([torch.zeros(keys.shape[0], 1, dtype=torch.int64), torch.cat(sizes, dim=1).cumsum(1)], dim=1)
        return [Units(*head) for head in zip(torch.cat(orders, dim=1), starts, strict=True)]


def spherical_kmeans(keys: Tensor, num_clusters: int, num_iterations: int) -> Tensor:
    """Group the rows of each head by direction, all heads at once.

    Args:
        keys: [kv_heads, num_tokens, dim] float32; they are centred here.
        num_clusters: 1 to `num_tokens`; each gets at least one token.
        num_iterations: rounds, at least one; in each, tokens go to the nearest centre, then centres to the middle of
            their tokens.

    Returns:
        [kv_heads, num_tokens] int64: the cluster of each token.
    """
    kv_heads, num_tokens, dim = keys.shape
    rows = torch.nn.functional.normalize(keys - keys.mean(dim=1, keepdim=True), dim=2)
    centres = rows[:, torch.arange(num_clusters) * num_tokens // num_clusters]
    base = torch.arange(kv_heads)[:, None] * num_clusters
    for _ in range(num_iterations):
        cluster = _nearest(rows, centres)
        sums = rows.new_zeros(kv_heads * num_clusters, dim)
        sums = sums.index_add_(0, (cluster + base).flatten(), rows.flatten(0, 1)).view_as(centres)
        # A cluster that lost all tokens, or whose tokens cancel out, keeps its centre.
        centres = torch.where(sums.any(dim=2, keepdim=True), torch.nn.functional.normalize(sums, dim=2), centres)
    return _without_empty(cluster, rows, centres)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    turned = centres.transpose(1, 2)
    return torch.cat([torch.bmm(part, turned).argmax(dim=2) for part in rows.split(_TOKENS_AT_ONCE, dim=1)], dim=1)


def _without_empty(cluster: Tensor, rows: Tensor, centres: Tensor) -> Tensor:
    """Give each empty cluster the token that fits its own one worst, and never the last of any."""
    kv_heads, num_clusters = centres.shape[:2]
    sizes = torch.zeros(kv_heads, num_clusters, dtype=torch.int64).scatter_add_(1, cluster, torch.ones_like(cluster))
    most = int((sizes == 0).sum(dim=1).max())
    if most == 0:
        return cluster
    similar = (rows * centres.gather(1, cluster[:, :, None].expand_as(rows))).sum(dim=2)
    order = similar.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, cluster.gather(1, order).argsort(dim=1, stable=True))
    starts = torch.cat([sizes.new_zeros(kv_heads, 1), sizes.cumsum(1)[:, :-1]], dim=1)
    # The first token of each cluster in this order is its best one.
    rank = torch.arange(cluster.shape[1]) - starts.gather(1, cluster.gather(1, order))
    spare = torch.where(rank == 0, float("inf"), similar.gather(1, order)).argsort(dim=1, stable=True)
    tokens = order.gather(1, spare[:, :most])
    empty = (sizes != 0).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    is_empty = sizes.gather(1, empty) == 0
    return cluster.scatter(1, tokens, torch.where(is_empty, empty, cluster.gather(1, tokens)))
