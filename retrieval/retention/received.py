# SPDX-License-Identifier: Apache-2.0
"""Retention by received attention: what later tokens looked at is what a question may want."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.tokens import LayerTokens


@dataclass(frozen=True, slots=True)
class MostReceived:
    """Keeps the tokens that received most, by the KV head that looked hardest.

    Source: KVzip (arXiv:2505.23416): a key is worth the largest attention that any query pays it while the model
    repeats the context. Give those maxima as `received`, and this is its score; sums over queries rank as InfLLM does.
    KVzip keeps other tokens in every head; ours keeps the same ones in all.
    """

    keeps_text: ClassVar[bool] = False

    def keep(self, tokens: LayerTokens, budget_tokens: int) -> Tensor:
        """See `Retention`."""
        return best(tokens.received.amax(dim=0), budget_tokens)


@dataclass(frozen=True, slots=True)
class SinkBuckets:
    """A short memory, the newest tokens; and a long one that covers all positions, by received attention.

    The newest tokens and all text stay. Then come the best tokens anywhere, `sink_share` of what the budget has left;
    then, over as many equal stretches of the run as the budget has tokens, the best one of each stretch that holds none
    of those, in order of score; then what is best of the rest.

    Source: LiveVLM (arXiv:2505.15269), Vision Sink Bucketing: mean attention of the last vision tokens, as many buckets
    as tokens are kept, each for one; the share of its sinks is not known to us.

    Args:
        sink_share: from 0 to 1.
        recent_tokens: of the short memory.

    Raises:
        ConfigError: `sink_share` is not from 0 to 1, or `recent_tokens` is negative.
    """

    keeps_text: ClassVar[bool] = True
    sink_share: float = 0.5
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sink_share <= 1:
            raise ConfigError(f"sink_share is {self.sink_share}; it must be from 0 to 1")
        if self.recent_tokens < 0:
            raise ConfigError(f"recent_tokens is {self.recent_tokens}; it must not be negative")

    def keep(self, tokens: LayerTokens, budget_tokens: int) -> Tensor:
        """See `Retention`."""
        places = torch.arange(tokens.num_tokens)
        is_fixed = (places >= tokens.num_tokens - self.recent_tokens) | (tokens.groups < 0)
        long = (~is_fixed).nonzero()[:, 0]
        budget = max(0, budget_tokens - int(is_fixed.sum()))
        order = tokens.received.sum(dim=0)[long].argsort(descending=True, stable=True)
        bucket = order * budget // max(1, long.shape[0])
        rank = torch.arange(order.shape[0])
        first = torch.full((budget + 1,), order.shape[0]).scatter_reduce_(0, bucket, rank, "amin")
        # 3: a sink; 2: the best of a bucket without one; 1: the rest. Of equals, the one that received more.
        worth = 1 + (rank == first[bucket]).int()
        worth[: round(self.sink_share * budget)] = 3
        kept = long[order[worth.argsort(descending=True, stable=True)[:budget]]]
        scores = torch.zeros(tokens.num_tokens).index_fill_(0, kept, 1).masked_fill_(is_fixed, 2)
        scores += is_fixed * (places >= tokens.num_tokens - self.recent_tokens)  # the newest before text
        return best(scores, min(budget_tokens, int((scores > 0).sum())))


def best(scores: Tensor, budget_tokens: int) -> Tensor:
    """Places of the `budget_tokens` best scores, ascending: `[num_kept]` int64; of equals the earlier; -inf never."""
    order = scores.argsort(descending=True, stable=True)[:budget_tokens]
    return order[~scores[order].isneginf()].sort().values
