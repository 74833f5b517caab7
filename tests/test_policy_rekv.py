# SPDX-License-Identifier: Apache-2.0
"""The policy `rekv` against its source's rule, written out."""

from __future__ import annotations

import torch

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.triggers.trigger import Choice
from tests.layer_tokens import layer_query, layer_tokens

FRAME = 49


def test_rekv_reads_the_frames_whose_mean_keys_fit_the_mean_query() -> None:
    tokens, query = layer_tokens(12 * FRAME, group_tokens=FRAME), layer_query(6)
    memory = LayerMemory(policy_named("rekv"), 2, 16)
    memory.add(tokens, is_end=True)
    selection = memory.select(query, budget_tokens=4 * FRAME)

    # As the source does it: mean keys are repeated for every query head, and all heads are one long vector.
    means = torch.stack([frame.mean(1).repeat_interleave(3, dim=0).flatten() for frame in tokens.keys.split(FRAME, 1)])
    scores = means @ query.query.flatten(0, 1).mean(1).flatten()
    torch.testing.assert_close(selection.scores, scores[None])
    assert len(selection.units) == 1
    assert selection.units[0].tolist() == sorted(scores.topk(4).indices.tolist())


def test_rekv_selects_once_per_question_and_closes_up_what_it_reads() -> None:
    policy = policy_named("rekv")
    assert policy.trigger.choose(1, torch.ones(6, 16), -torch.ones(6, 16)) is Choice.KEEP
    assert policy.position is PositionPolicy.CONSECUTIVE
    assert not policy.retrieves_while_appending
    # What is recent is read only if it is found.
    assert policy.recent_tokens == 0
