# SPDX-License-Identifier: Apache-2.0
"""What every policy owes, for models of any shape and streams fed in any way."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens

POLICIES = ("arkvale", "freekv", "infllm", "louiskv", "quest", "rekv", "retroinfer", "shadowkv")


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=6, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 5]),
    group=st.sampled_from([1, 4, 16]),
    dim=st.sampled_from([32, 64, 256]),
    num_tokens=st.integers(1, 300),
    group_tokens=st.sampled_from([0, 1, 7, 49]),
    steps=st.lists(st.integers(1, 299), max_size=4),
)
def test_every_token_is_in_one_unit_and_a_large_budget_reads_them_all(
    name: str, kv_heads: int, group: int, dim: int, num_tokens: int, group_tokens: int, steps: list[int]
) -> None:
    tokens = layer_tokens(num_tokens, kv_heads=kv_heads, dim=dim, group_tokens=group_tokens)
    # Values need not be as wide as keys.
    tokens = dataclasses.replace(tokens, values=tokens.values[:, :, :24])
    query = layer_query(3, kv_heads=kv_heads, group=group, dim=dim)
    memory = LayerMemory(policy_named(name), kv_heads, dim)
    for start, end in pairwise(sorted({0, num_tokens, *(step for step in steps if step < num_tokens)})):
        memory.add(tokens.part(start, end), is_end=end == num_tokens)
        assert memory.num_tokens + memory.num_pending == end

    every = [torch.arange(memory.table.num_units)] * kv_heads
    for found in (memory.table.tokens_of(every), memory.select(query, num_tokens).tokens):
        assert all(each.tolist() == list(range(num_tokens)) for each in found)
    few = memory.select(query, 40).tokens
    assert all(each.diff().min() > 0 for each in few if each.shape[0] > 1)
