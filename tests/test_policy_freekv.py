# SPDX-License-Identifier: Apache-2.0
"""The policy `freekv` against its paper's rule, written out."""

from __future__ import annotations

import torch

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.triggers.trigger import Choice
from tests.layer_tokens import layer_query, layer_tokens, rotate

PAGE = 32


def test_freekv_reads_the_pages_with_the_largest_mean_share_of_the_heads_bounds() -> None:
    tokens, query = layer_tokens(20 * PAGE), layer_query(2)
    memory = LayerMemory(policy_named("freekv"), 2, 16)
    memory.add(tokens)
    selection = memory.select(query, budget_tokens=5 * PAGE)

    keys = rotate(tokens.keys[None], tokens.positions[:, None])[0]
    asking = rotate(query.query[:, :, -1:].flatten(0, 1)[None], query.positions[:, None, -1:])[0].view(2, 3, 16)
    for head in range(2):
        pages = keys[head].split(PAGE)
        shares = torch.zeros(20)
        for each in asking[head]:
            bounds = [float(torch.maximum(each * page.amax(0), each * page.amin(0)).sum()) for page in pages]
            shares += (torch.tensor(bounds) / 4).softmax(0) / 3
        torch.testing.assert_close(selection.scores[head], shares)
        assert selection.units[head].tolist() == sorted(shares.topk(5).indices.tolist())


def test_freekv_reads_what_the_step_before_selected_unless_the_queries_turn() -> None:
    trigger = policy_named("freekv").trigger
    previous = torch.eye(6, 16)
    for cosine, choice in ((0.81, Choice.SELECT_NEXT), (0.79, Choice.SELECT)):
        query = cosine * previous + (1 - cosine**2) ** 0.5 * previous.roll(6, dims=1)
        assert trigger.choose(1, query, previous) is choice
