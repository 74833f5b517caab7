# SPDX-License-Identifier: Apache-2.0
"""The policy `infllm` against its paper's rule, written out."""

from __future__ import annotations

import torch

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens, rotate

PAGE, BEST = 128, 4


def test_infllm_reads_the_pages_whose_most_looked_at_keys_fit_the_mean_query_from_afar() -> None:
    tokens, query = layer_tokens(10 * PAGE), layer_query(5)
    memory = LayerMemory(policy_named("infllm"), 2, 16)
    memory.add(tokens)
    selection = memory.select(query, budget_tokens=3 * PAGE)

    # Keys stand at angle 0, queries at the far position.
    far = torch.full_like(query.positions, query.far_position)
    asking = rotate(query.query.flatten(0, 1)[None], far[:, None])[0].view(2, 3, 5, 16).mean(2)
    scores = []
    for page in range(10):
        score = 0.0
        for head in range(2):
            inside = range(PAGE * page, PAGE * (page + 1))
            best = sorted(inside, key=lambda token: -float(tokens.received[head, token]))[:BEST]
            key = sum(tokens.keys[head, token] for token in best) / BEST
            score += sum(float(each @ key) for each in asking[head])
        scores.append(score)
    # All heads of a layer read the same pages.
    torch.testing.assert_close(selection.scores, torch.tensor([scores]))
    assert len(selection.units) == 1
    assert selection.units[0].tolist() == sorted(sorted(range(10), key=lambda page: -scores[page])[:3])


def test_infllm_looks_back_while_it_appends_and_reads_at_one_distance() -> None:
    policy = policy_named("infllm")
    assert policy.retrieves_while_appending
    assert policy.position is PositionPolicy.CONSTANT_FAR
