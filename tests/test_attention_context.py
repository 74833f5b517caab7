# SPDX-License-Identifier: Apache-2.0
"""Attention inputs whose retrieved part has a temperature and a scale, against the rule written out."""

from __future__ import annotations

import math

import pytest
import torch

from kvstore.session.attention_inputs import AttentionInputs, ContextRule


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_context_is_cooled_and_weighed_for_each_query(num_new: int, is_padded: bool) -> None:
    chance = torch.Generator().manual_seed(num_new)
    num_past, first, end = 9, 2, 7
    query = torch.randn(1, 4, num_new, 8, generator=chance)
    keys, values = (torch.randn(1, 2, num_past + num_new, 8, generator=chance) for _ in range(2))
    bias = torch.zeros(2, num_past)
    bias[1, 5:7] = float("-inf")  # the second KV head read two tokens less
    rule = ContextRule(slice(first, end), 0.6, 0.8)
    inputs = AttentionInputs(query, keys, values, num_past, None, 0, bias if is_padded else None, rule)
    had = inputs.attend(inputs.mask(None), 0.5)
    for head in range(4):
        for number in range(num_new):
            logits = [float(query[0, head, number] @ key) / 2 for key in keys[0, head // 2]]
            seen = [place for place in range(num_past + number + 1) if not (is_padded and head > 1 and place in (5, 6))]
            context = [place for place in seen if first <= place < end]
            together = sum(math.exp(logits[place] / 0.6) for place in context)
            weights = {place: math.exp(logits[place]) for place in seen}
            for place in context:
                weights[place] = math.exp(logits[place] / 0.6) / together * together ** (0.6 * 0.8)
            parts = [weight * values[0, head // 2, place] for place, weight in weights.items()]
            wanted = torch.stack(parts).sum(0) / sum(weights.values())
            torch.testing.assert_close(had[0, head, number], wanted, atol=1e-5, rtol=1e-4)
