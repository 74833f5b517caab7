# SPDX-License-Identifier: Apache-2.0
"""A view: one way to look at units. How they are summarised, how a query asks, and how the two make a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from kvstore.retrieval.tokens import LayerQuery, LayerTokens, Space
from kvstore.retrieval.units import Units


class Pool(StrEnum):
    """Which of a forward's queries ask: the `last` one, the `mean` of all, or `each`, whose scores are averaged."""

    LAST = "last"
    MEAN = "mean"
    EACH = "each"


class Group(StrEnum):
    """How the scores of the query heads that read one KV head become one.

    SUM: as they are, summed. The others turn each head's scores into shares of 1 by a softmax over the units first.
    """

    SUM = "sum"
    SOFTMAX_MEAN = "softmax_mean"
    SOFTMAX_MAX = "softmax_max"


class Summariser(Protocol):
    """Makes the vector that stands for a unit."""

    def width(self, key_dim: int) -> int:
        """Elements of a summary."""

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """Summarise units of some KV heads.

        Args:
            keys: [num_heads, num_tokens, key_dim] float32: keys of these heads in the view's space, in the order of
                `units.tokens`.
            tokens: all that is known of the tokens, in the order of the stream.
            units: how they are cut; every token of `units` is in `tokens`.
            heads: which KV heads these are.

        Returns:
            [num_heads, num_units, width] float32.
        """


class Scorer(Protocol):
    """Lifts a query so that its inner product with a summary is the score."""

    def lift(self, queries: Tensor) -> Tensor:
        """Turn `[..., key_dim]` float32 queries into `[..., width]` float32."""


@dataclass(frozen=True, slots=True)
class View:
    """One way to look at units.

    Args:
        summariser: makes summaries.
        scorer: lifts queries to them.
        space: where keys and queries are compared.
        pool: which queries ask.
        group: how the heads of a group agree.
        is_shared: whether all KV heads of a layer select together, by the sum of their scores.
    """

    summariser: Summariser
    scorer: Scorer
    space: Space
    pool: Pool = Pool.LAST
    group: Group = Group.SUM
    is_shared: bool = False

    def summaries(self, tokens: LayerTokens, units: Sequence[Units]) -> Tensor:
        """Summarise new units.

        Args:
            tokens: what they are cut from.
            units: one for all KV heads, or one for each, of equally many units.

        Returns:
            [kv_heads, num_units, width] float32.
        """
        keys = tokens.in_space(self.space)
        if len(units) == 1:
            ordered = keys[:, units[0].tokens - tokens.first]
            return self.summariser.summarise(ordered, tokens, units[0], slice(0, keys.shape[0]))
        return torch.cat(
            [
                self.summariser.summarise(
                    keys[head : head + 1, each.tokens - tokens.first], tokens, each, slice(head, head + 1)
                )
                for head, each in enumerate(units)
            ]
        )

    def lifted(self, query: LayerQuery) -> Tensor:
        """What asks the index: `[kv_heads, num_asking, width]` float32.

        With `Group.SUM` one vector asks for all heads of a group and all tokens; else each head and token asks.
        """
        last = slice(-1, None) if self.pool is Pool.LAST else slice(None)
        queries = query.in_space(self.space, last)
        if self.pool is Pool.MEAN:
            queries = queries.mean(dim=2, keepdim=True)
        lifted = self.scorer.lift(queries)
        if self.group is not Group.SUM:
            return lifted.flatten(1, 2)
        of_group = lifted.sum(dim=1)
        return of_group if of_group.shape[1] == 1 else of_group.mean(dim=1, keepdim=True)

    def agree(self, scores: Tensor, num_tokens: int, scale: float, num_layers: int = 1) -> Tensor:
        """One score per unit from those of all that asked.

        Args:
            scores: [kv_heads, num_asking, num_units] float32: inner products of `lifted` and summaries; the KV heads
                of several layers follow each other.
            num_tokens: query tokens among those that asked.
            scale: multiplies logits before a softmax.
            num_layers: layers that the KV heads are of.

        Returns:
            [kv_heads, num_units] float32, or [num_layers, num_units] where all KV heads of a layer select together.
        """
        if self.group is Group.SUM:
            found = scores[:, 0]
        else:
            shares = (scores * scale).softmax(dim=-1).unflatten(1, (-1, num_tokens)).mean(dim=2)
            found = shares.amax(dim=1) if self.group is Group.SOFTMAX_MAX else shares.mean(dim=1)
        of_layer, num_units = found.shape[0] // num_layers, found.shape[1]
        return found.reshape(num_layers, of_layer, num_units).sum(dim=1) if self.is_shared else found
