# SPDX-License-Identifier: Apache-2.0
"""Selectors that take a number, or a share, of the units: what most papers state instead of a budget in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.selectors.budget import take_best


@dataclass(frozen=True, slots=True)
class TopUnits:
    """The `num_units` best units of each partition, or as many of them as the budget has room for.

    Source: InfLLM (arXiv:2402.04617), ReKV (arXiv:2503.00540), ArkVale (NeurIPS 2024).

    Raises:
        ConfigError: `num_units` is not positive.
    """

    num_units: int

    def __post_init__(self) -> None:
        if self.num_units < 1:
            raise ConfigError(f"the best {self.num_units} units; take at least one")

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`."""
        return take_best(scores, sizes, budget_tokens, self.num_units)


@dataclass(frozen=True, slots=True)
class TopShare:
    """That share of the units which may be chosen, rounded up, or as many of them as the budget has room for.

    Source: LiveVLM (arXiv:2505.15269) takes .4 of its pages, RetroInfer (arXiv:2505.02922) .018 of its clusters.

    Raises:
        ConfigError: `share` is not above 0 and at most 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"a share of {self.share} of the units; it must be above 0 and at most 1")

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`."""
        if scores.shape[1] == 0:
            return scores > 0
        num_eligible = int((~scores.isneginf()).sum(1).max())  # the same in all partitions but for clusters
        return take_best(scores, sizes, budget_tokens, math.ceil(self.share * num_eligible))
