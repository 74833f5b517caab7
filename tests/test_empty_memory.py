# SPDX-License-Identifier: Apache-2.0
"""A layer's memory before its first unit is cut."""

from __future__ import annotations

import pytest

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policies, policy_named
from tests.layer_tokens import layer_query, layer_tokens


@pytest.mark.parametrize("name", [name for name, policy in policies().items() if policy.segmenter is not None])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_nothing_is_selected_from_a_memory_without_units(name: str, num_tokens: int) -> None:
    memory = LayerMemory(policy_named(name), 2, 16)
    memory.add(layer_tokens(num_tokens))
    for end in (None, 0, 1):
        selection = memory.select(layer_query(2), 100, end)
        assert all(tokens.numel() == 0 for tokens in (*selection.tokens, *selection.units))
