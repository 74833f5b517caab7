# SPDX-License-Identifier: Apache-2.0
"""One key that stands for a unit: the mean of its keys, or of those that other tokens looked at most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.summarisers.bounds import reduce
from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Units


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean key; of a cluster, its centroid.

    Source: ReKV (arXiv:2503.00540) for frames, ShadowKV (arXiv:2410.21465) for pages, LouisKV (arXiv:2510.11292) and
    RetroInfer (arXiv:2505.02922) for clusters.
    """

    def width(self, key_dim: int) -> int:
        """One key."""
        return key_dim

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """See `Summariser`."""
        return reduce(keys, units, "mean")


@dataclass(frozen=True, slots=True)
class Received:
    """The mean of the keys of the `num_tokens` tokens that received most attention; of equals, the earlier ones.

    Source: InfLLM (arXiv:2402.04617), with the attention mass that its code ranks by where the paper has raw products.
    Ours ranks once for all query heads of a KV head, by the sum of what they paid: one list instead of a group's.

    Raises:
        ConfigError: `num_tokens` is not positive.
    """

    num_tokens: int = 4

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigError(f"a mean of {self.num_tokens} tokens; it takes at least one")

    def width(self, key_dim: int) -> int:
        """One key."""
        return key_dim

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """See `Summariser`."""
        unit = units.unit_of_place()
        received = tokens.received[heads, units.tokens - tokens.first]
        order = received.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, unit[order].argsort(dim=1, stable=True))
        # Units follow each other again, each by rank; so the first places are the same for all heads.
        is_first = torch.arange(units.num_tokens) - units.starts[unit] < self.num_tokens
        sizes = units.sizes.clamp_max(self.num_tokens)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        best = order[:, is_first, None].expand(-1, -1, keys.shape[2])
        return reduce(keys.gather(1, best), Units(units.tokens[is_first], starts), "mean")
