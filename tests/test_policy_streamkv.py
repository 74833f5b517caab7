# SPDX-License-Identifier: Apache-2.0
"""The policy `streamkv` against its source's rule, written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.tokens import LayerTokens
from tests.layer_tokens import layer_query, layer_tokens

FRAME = 4
SCENES = [5, 4, 9, 6, 4, 12, 7, 5, 8, 4]  # frames of each


def film() -> LayerTokens:
    """Frames of 4 tokens; within a scene they are almost alike."""
    num_frames = sum(SCENES)
    tokens = layer_tokens(num_frames * FRAME, group_tokens=FRAME, dim=32)
    scene = torch.repeat_interleave(torch.arange(len(SCENES)), torch.tensor(SCENES) * FRAME)
    shown = layer_tokens(len(SCENES), dim=32, seed=5).keys
    return replace(tokens, keys=shown[:, scene] + 0.05 * tokens.keys)


@pytest.mark.parametrize("budget", [20, 60, 111, 160])
def test_streamkv_reads_scenes_up_to_one_share_in_all_heads(budget: int) -> None:
    tokens, query = film(), layer_query(5, dim=32)
    memory = LayerMemory(policy_named("streamkv"), 2, 32)
    memory.add(tokens, is_end=True)
    sizes = [frames * FRAME for frames in SCENES]
    assert memory.table.sizes.tolist() == [sizes]

    means_of_heads = query.query.mean(dim=2)
    asking = (means_of_heads / means_of_heads.norm(dim=-1, keepdim=True)).sum(dim=1)
    ranked, reached = [], []
    for head in range(2):
        means = [scene.mean(dim=0) for scene in tokens.keys[head].split(sizes)]
        cosines = torch.stack([asking[head] @ mean / mean.norm() for mean in means])
        shares = ((cosines - cosines.mean()) / cosines.std()).softmax(dim=0)
        order = shares.argsort(descending=True)
        ranked.append(order.tolist())
        reached.append(shares[order].cumsum(0))
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        counts = [max(1, int((shares < middle).sum())) for shares in reached]
        num_tokens = sum(sizes[unit] for order, count in zip(ranked, counts, strict=True) for unit in order[:count])
        low, high = (low, middle) if num_tokens > 2 * budget else (middle, high)
    selection = memory.select(query, budget)
    for head in range(2):
        count = max(1, int((reached[head] < low).sum()))
        assert selection.units[head].tolist() == sorted(ranked[head][:count])


def test_streamkv_closes_up_what_it_reads() -> None:
    assert policy_named("streamkv").position is PositionPolicy.CONSECUTIVE
