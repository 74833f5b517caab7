# SPDX-License-Identifier: Apache-2.0
"""A selector that stops when it has enough: as few units as together hold a share of all attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.selectors.budget import most_that_fit


@dataclass(frozen=True, slots=True)
class CumulativeMass:
    """The best units of each partition until their shares reach `mass`, or the next one would not fit the budget.

    A peaked partition reads less than its budget, a flat one all of it. The best unit is always taken.

    Source: Twilight (arXiv:2502.02770), which prunes tokens so; ours takes units, and stops at the budget.

    Args:
        mass: of 1; with 1 only the budget counts.
        scale: multiplies scores before a softmax makes shares of them, `key_dim ** -0.5` for inner products of whole
            keys; None where they are shares already (`Group.SOFTMAX_MEAN`), which are divided by their sum.

    Raises:
        ConfigError: `mass` is not above 0 and at most 1, or `scale` is not positive.
    """

    mass: float
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ConfigError(f"a mass of {self.mass}; it must be above 0 and at most 1")
        if self.scale is not None and not self.scale > 0:
            raise ConfigError(f"scores scaled by {self.scale}; it must be positive, or None where they are shares")

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`."""
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        if budget_tokens <= 0 or scores.shape[1] == 0:
            return chosen
        most = most_that_fit(sizes, budget_tokens)
        if self.scale is None:
            shares = scores.masked_fill(scores.isneginf(), 0)
            shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        else:
            shares = (scores * self.scale).softmax(dim=1)
        best = scores.topk(most, dim=1)
        is_taken = sizes.gather(1, best.indices).cumsum(1) <= budget_tokens
        if self.mass < 1:
            held = shares.gather(1, best.indices)
            is_taken &= held.cumsum(1) - held < self.mass
        is_taken[:, 0] = True
        return chosen.scatter_(1, best.indices, is_taken & ~best.values.isneginf())
