# SPDX-License-Identifier: Apache-2.0
"""The policy `retroinfer` against its paper's rule, written out."""

from __future__ import annotations

import math

import torch

from kvstore.kernels.parts_reference import attend_part, estimated_part, merge_parts
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens, rotate

NUM_TOKENS, BUDGET, SHARE = 1500, 200, 0.232


def test_retroinfer_reads_the_best_clusters_and_estimates_the_next_best() -> None:
    tokens, query = layer_tokens(NUM_TOKENS), layer_query(1)
    memory = LayerMemory(policy_named("retroinfer"), 2, 16)
    memory.add(tokens, is_end=True)
    selection = memory.select(query, BUDGET)
    estimate = selection.estimate
    assert estimate is not None

    keys = rotate(tokens.keys[None], tokens.positions[:, None])[0]
    asking = rotate(query.query.flatten(0, 1)[None], query.positions[:, None])[0].view(2, 3, 16)
    every = torch.arange(memory.table.num_units)
    for head in range(2):
        clusters = [memory.table.tokens_of([unit[None]] * 2)[head] for unit in every]
        centroids = torch.stack([keys[head, cluster].mean(0) for cluster in clusters])
        scores = sum((each @ centroids.T / 4).softmax(0) for each in asking[head])
        order = torch.as_tensor(scores).argsort(descending=True).tolist()
        chosen, room = [], BUDGET
        for unit in order:
            room -= len(clusters[unit])
            if room < 0:
                break
            chosen.append(unit)
        next_best = order[len(chosen) : len(chosen) + round(SHARE * len(clusters))]
        assert selection.units[head].tolist() == sorted(chosen)
        assert selection.estimated[head].tolist() == sorted(next_best)

        # Attention to both, query head by query head.
        read = selection.tokens[head]
        exact = attend_part(
            asking[None, head, :, None], keys[None, None, head, read], tokens.values[None, None, head, read],
            mask=None, scale=0.25,
        )  # fmt: skip
        one = slice(head, head + 1)
        guess = estimated_part(
            asking[None, head, :, None], estimate.centroids[None, one], estimate.counts[None, one],
            estimate.value_sums[None, one], scale=0.25,
        )  # fmt: skip
        merged = merge_parts([exact, guess])[0][0, :, 0]
        for number, each in enumerate(asking[head]):
            above, below = torch.zeros(16), 0.0
            for token in read.tolist():
                weight = math.exp(float(each @ keys[head, token]) / 4)
                above, below = above + weight * tokens.values[head, token], below + weight
            for unit in next_best:
                weight = math.exp(float(each @ centroids[unit]) / 4)
                above = above + weight * tokens.values[head, clusters[unit]].sum(0)
                below += weight * len(clusters[unit])
            torch.testing.assert_close(merged[number], above / below, atol=1e-4, rtol=1e-3)


def test_nothing_is_estimated_where_everything_is_read() -> None:
    memory = LayerMemory(policy_named("retroinfer"), 2, 16)
    memory.add(layer_tokens(100), is_end=True)
    selection = memory.select(layer_query(1), 100)
    assert [each.tolist() for each in selection.tokens] == [list(range(100))] * 2
    assert [each.tolist() for each in selection.estimated] == [[], []]


def test_a_memory_without_units_estimates_nothing() -> None:
    memory = LayerMemory(policy_named("retroinfer"), 2, 16)
    memory.add(layer_tokens(2047))
    selection = memory.select(layer_query(1), 100)
    assert [each.tolist() for each in selection.tokens] == [[], []]
    assert [each.tolist() for each in selection.estimated] == [[], []]
