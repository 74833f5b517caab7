# SPDX-License-Identifier: Apache-2.0
"""The policy `louiskv` against its paper's rule, written out."""

from __future__ import annotations

import torch

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.triggers.trigger import Choice
from tests.layer_tokens import layer_query, layer_tokens, rotate


def test_louiskv_reads_the_clusters_with_the_largest_mean_share_of_the_heads() -> None:
    tokens, query = layer_tokens(800), layer_query(2)
    memory = LayerMemory(policy_named("louiskv"), 2, 16)
    memory.add(tokens, is_end=True)
    selection = memory.select(query, budget_tokens=120)

    keys = rotate(tokens.keys[None], tokens.positions[:, None])[0]
    asking = rotate(query.query[:, :, -1:].flatten(0, 1)[None], query.positions[:, None, -1:])[0].view(2, 3, 16)
    assert memory.table.num_units == 800 // 16
    for head in range(2):
        clusters = [memory.table.tokens_of([torch.tensor([unit])] * 2)[head] for unit in range(50)]
        centroids = torch.stack([keys[head, cluster].mean(0) for cluster in clusters])
        shares = torch.stack([(each @ centroids.T / 4).softmax(0) for each in asking[head]]).mean(0)
        torch.testing.assert_close(selection.scores[head], shares)
        chosen, room = [], 120
        for unit in shares.argsort(descending=True).tolist():
            room -= len(clusters[unit])
            if room < 0:
                break
            chosen.append(unit)
        assert selection.units[head].tolist() == sorted(chosen)
        assert selection.tokens[head].tolist() == sorted(torch.cat([clusters[unit] for unit in chosen]).tolist())


def test_louiskv_selects_anew_where_the_queries_turn() -> None:
    trigger = policy_named("louiskv").trigger
    previous = torch.eye(6, 16)
    for cosine, choice in ((0.86, Choice.KEEP), (0.84, Choice.SELECT)):
        query = cosine * previous + (1 - cosine**2) ** 0.5 * previous.roll(6, dims=1)
        assert trigger.choose(1, query, previous) is choice
