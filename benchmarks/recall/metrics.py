# SPDX-License-Identifier: Apache-2.0
"""How much of what matters was chosen: the share of attention that it gets, and of a planted note's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.retrieval.tokens import LayerQuery
from recall.capture import Layer
from recall.choosers import Choose

FULL_LAYERS = 2
"""The first layers read everything, whatever a policy says: attention is not sparse there."""


def recovered(attention: Tensor, chosen: Sequence[Tensor], first: int) -> float:
    """Attention that goes to chosen tokens.

    Args:
        attention: [kv_heads, group, num_tokens] float32, what one query token pays to each token of the middle.
        chosen: [num_chosen] int64 numbers of tokens, for each KV head.
        first: number of the middle's first token.
    """
    return sum((float(paid[:, tokens - first].sum()) for paid, tokens in zip(attention, chosen, strict=True)), 0.0)


def covered(chosen: Sequence[Tensor], wanted: slice) -> float:
    """Share of the tokens `wanted` that were chosen, averaged over KV heads."""
    found = [int(((tokens >= wanted.start) & (tokens < wanted.stop)).sum()) for tokens in chosen]
    wanted_tokens: int = wanted.stop - wanted.start
    return sum(found) / len(found) / wanted_tokens


def asking(layer: Layer, token: int) -> LayerQuery:
    """One of a layer's queries."""
    one = slice(token, token + 1)
    query = layer.query
    return LayerQuery(query.query[:, :, one], query.positions[:, one], query.rotate, query.far_position)


def mass_recall(chooses: Sequence[Choose], layers: Sequence[Layer], budgets: Sequence[int]) -> dict[int, float]:
    """Share of the attention to the middle that goes to what is read, by budget in tokens.

    Over all layers but the full ones, all queries and all query heads together: a head that looks elsewhere counts
    little. Every query token chooses for itself.
    """
    found = dict.fromkeys(budgets, 0.0)
    paid = 0.0
    for choose, layer in list(zip(chooses, layers, strict=True))[FULL_LAYERS:]:
        paid += float(layer.attention.sum())
        for token in range(layer.query.query.shape[2]):
            query = asking(layer, token)
            for budget in budgets:
                chosen = choose(query, budget)
                found[budget] += recovered(layer.attention[:, :, token], chosen, layer.middle.first)
    return {budget: mass / paid for budget, mass in found.items()}


def needle_coverage(
    chooses: Sequence[Choose], layers: Sequence[Layer], asks: Sequence[tuple[slice, slice]], budget: int
) -> float:
    """Share of planted notes' tokens that are read when they are asked for.

    Averaged over layers but the full ones, KV heads, and the tokens that ask.

    Args:
        chooses: who chooses in each layer.
        layers: of a text with notes in its middle.
        asks: (which of the queries ask, numbers of the note's tokens), for each note.
        budget: tokens.
    """
    found = []
    for choose, layer in list(zip(chooses, layers, strict=True))[FULL_LAYERS:]:
        for tokens, note in asks:
            found += [covered(choose(asking(layer, token), budget), note) for token in range(tokens.start, tokens.stop)]
    return float(torch.tensor(found).mean())
