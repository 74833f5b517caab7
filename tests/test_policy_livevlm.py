# SPDX-License-Identifier: Apache-2.0
"""The policy `livevlm` against its source's rule, written out."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens

PAGE = 16


def test_livevlm_reads_two_fifths_of_its_pages_by_mean_keys_without_positions() -> None:
    tokens, query = layer_tokens(22 * PAGE + 5), layer_query(6)
    memory = LayerMemory(policy_named("livevlm"), 2, 16)
    memory.add(tokens, is_end=True)

    scores = [0.0] * 23
    for kv_head in range(2):
        means = [page.mean(dim=0) for page in tokens.keys[kv_head].split(PAGE)]
        for head in range(3):
            asking = query.query[kv_head, head].mean(dim=0)
            powers = [math.exp(float(asking @ mean) / 4) for mean in means]
            for page, power in enumerate(powers):
                scores[page] += power / sum(powers) / 3
    ranked = sorted(range(23), key=lambda page: -scores[page])

    everything = memory.select(query, tokens.num_tokens)
    torch.testing.assert_close(everything.scores, torch.tensor([scores]))
    assert everything.units[0].tolist() == sorted(ranked[:10])  # 9.2 pages, rounded up
    assert memory.select(query, 3 * PAGE).units[0].tolist() == sorted(ranked[:3])


def test_livevlm_reads_at_original_positions_and_always_what_is_recent() -> None:
    policy = policy_named("livevlm")
    assert policy.position is PositionPolicy.ORIGINAL
    assert policy.recent_tokens > 0


def test_livevlm_thins_what_it_stores_to_sinks_and_to_all_of_the_time() -> None:
    tokens = replace(layer_tokens(64, group_tokens=8), received=torch.linspace(1, 0, 64).expand(2, -1))
    retention = policy_named("livevlm").retention
    assert retention is not None
    # The 4 that received most, all at the start; then the first of each eighth that has none of them.
    assert retention.retention.keep(tokens, 8).tolist() == [0, 1, 2, 3, 8, 16, 24, 32]
