# SPDX-License-Identifier: Apache-2.0
"""Selectors: which units a score earns a place, and the simplest one: the best, as many as fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Selector(Protocol):
    """Says which units are read."""

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """Choose units, in each partition by itself or over all of them.

        Args:
            scores: [num_partitions, num_units] float32, larger is better; -inf for units that may not be chosen.
            sizes: [num_partitions, num_units] int64: tokens of each.
            budget_tokens: most tokens to read, on average over the partitions; 0 chooses nothing.

        Returns:
            [num_partitions, num_units] bool.
        """


@runtime_checkable
class LayeredSelector(Selector, Protocol):
    """A selector that chooses in another way in every layer."""

    def in_layer(self, layer: int) -> Selector:
        """The one for a layer, counted from 0."""


@runtime_checkable
class SharingSelector(Selector, Protocol):
    """A selector that can choose for all layers at once."""

    def select_together(self, scores: Sequence[Tensor], sizes: Sequence[Tensor], budget_tokens: int) -> list[Tensor]:
        """Choose units of several layers.

        Args:
            scores: of each layer; see `Selector`. Layers may have different units.
            sizes: of each layer, likewise.
            budget_tokens: most tokens to read, on average over the partitions of all layers.

        Returns:
            For each layer what `select` returns.
        """


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """The best units of each partition, in order of score, until the next one would not fit.

    The best unit is taken even when it alone exceeds the budget, so that no question goes unanswered for want of room.
    """

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`."""
        return take_best(scores, sizes, budget_tokens, scores.shape[1])


def most_that_fit(sizes: Tensor, budget_tokens: int) -> int:
    """Bound how many units of a partition a budget holds, at least 1: what is beyond need not be sorted.

    One short page at the end of a stream must not make it sixteen times as many.

    Args:
        sizes: [num_partitions, num_units] int64, of one unit at least.
        budget_tokens: most tokens to read.
    """
    low, high = (int(size) for size in sizes.aminmax())
    num_short = int((sizes < high).sum(dim=1).max()) if low < high else 0
    return min(sizes.shape[1], max(1, min(budget_tokens // low, num_short + budget_tokens // high)))


def take_best(scores: Tensor, sizes: Tensor, budget_tokens: int, most: int) -> Tensor:
    """Take up to `most` units of each partition by the rule of `TokenBudget`; see `Selector` for the rest."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if budget_tokens <= 0 or scores.shape[1] == 0 or most <= 0:
        return chosen
    most = min(most, most_that_fit(sizes, budget_tokens))
    best = scores.topk(most, dim=1)
    fits = sizes.gather(1, best.indices).cumsum(1) <= budget_tokens
    fits[:, 0] = True
    return chosen.scatter_(1, best.indices, fits & best.values.isfinite())
