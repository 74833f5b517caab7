# SPDX-License-Identifier: Apache-2.0
"""The policy `quest` against its paper's rule, written out."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens, rotate

PAGE = 16


def upper_bound(query: Tensor, page: Tensor) -> float:
    """The largest logit that any key in the box around the page could have with the query."""
    return float(torch.maximum(query * page.amax(0), query * page.amin(0)).sum())


def test_quest_reads_the_pages_with_the_largest_possible_logits() -> None:
    tokens, query = layer_tokens(320), layer_query(4)
    memory = LayerMemory(policy_named("quest"), 2, 16)
    memory.add(tokens)
    selection = memory.select(query, budget_tokens=64)

    keys = rotate(tokens.keys[None], tokens.positions[:, None])[0]
    asking = rotate(query.query[:, :, -1:].flatten(0, 1)[None], query.positions[:, None, -1:])[0].view(2, 3, 16)
    for head in range(2):
        pages = keys[head].split(PAGE)
        # One list for the heads of a group: their bounds are summed.
        scores = [sum(upper_bound(each, page) for each in asking[head]) for page in pages]
        best = sorted(range(len(pages)), key=lambda page: -scores[page])[:4]
        assert selection.units[head].tolist() == sorted(best)
        wanted = [token for page in sorted(best) for token in range(PAGE * page, PAGE * (page + 1))]
        assert selection.tokens[head].tolist() == wanted


def test_a_bound_is_never_below_a_logit() -> None:
    tokens, query = layer_tokens(320), layer_query(1)
    memory = LayerMemory(policy_named("quest"), 2, 16)
    memory.add(tokens)
    keys = tokens.rotated
    asking = rotate(query.query.flatten(0, 1)[None], query.positions[:, None])[0].view(2, 3, 16).sum(1)
    logits = torch.einsum("hd,hpkd->hpk", asking, keys.unflatten(1, (-1, PAGE)))
    assert (memory.score(query) >= logits.amax(2) - 1e-4).all()
