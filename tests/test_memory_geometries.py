# SPDX-License-Identifier: Apache-2.0
"""What a memory owes under every policy: each token in one unit, for models of any shape and streams fed anyhow."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens, rotate

POLICIES = ("arkvale", "freekv", "infllm", "louiskv", "quest", "rekv", "retroinfer", "shadowkv")


def rotate_rows(vectors: Tensor, positions: Tensor) -> Tensor:
    """Rotate each part of the channels by a row of positions of its own."""
    rows = positions.shape[0]
    parts = vectors.unflatten(-1, (2, -1)).tensor_split(rows, dim=-1)
    rotated = [rotate(part.flatten(-2), positions[row : row + 1]) for row, part in enumerate(parts)]
    return torch.cat([part.unflatten(-1, (2, -1)) for part in rotated], dim=-1).flatten(-2)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=6, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 5]),
    group=st.sampled_from([1, 4, 16]),
    dim=st.sampled_from([32, 64, 256]),
    num_tokens=st.integers(1, 300),
    group_tokens=st.sampled_from([0, 1, 7, 49]),
    steps=st.lists(st.integers(1, 299), max_size=4),
    rows=st.sampled_from([1, 3]),
)
def test_every_token_is_in_one_unit_and_a_large_budget_reads_them_all(
    name: str, kv_heads: int, group: int, dim: int, num_tokens: int, group_tokens: int, steps: list[int], rows: int
) -> None:
    tokens = layer_tokens(num_tokens, kv_heads=kv_heads, dim=dim, group_tokens=group_tokens)
    # Values need not be as wide as keys, and pictures have a position in time, height and width.
    positions = torch.stack([tokens.positions[0] // (7**row) for row in range(rows)])
    tokens = dataclasses.replace(tokens, values=tokens.values[:, :, :24], positions=positions, rotate=rotate_rows)
    query = layer_query(3, kv_heads=kv_heads, group=group, dim=dim)
    query = dataclasses.replace(query, positions=query.positions.expand(rows, -1), rotate=rotate_rows)
    memory = LayerMemory(policy_named(name), kv_heads, dim)
    for start, end in pairwise(sorted({0, num_tokens, *(step for step in steps if step < num_tokens)})):
        memory.add(tokens.part(start, end), is_end=end == num_tokens)
        assert memory.num_tokens + memory.num_pending == end

    every = [torch.arange(memory.table.num_units)] * kv_heads
    for found in (memory.table.tokens_of(every), memory.select(query, num_tokens).tokens):
        assert all(each.tolist() == list(range(num_tokens)) for each in found)
    few = memory.select(query, 40).tokens
    assert all(each.diff().min() > 0 for each in few if each.shape[0] > 1)


def test_pending_tokens_hold_no_memory_of_others() -> None:
    tokens = layer_tokens(1003)
    memory = LayerMemory(policy_named("quest"), 2, 16)
    memory.add(tokens)
    assert memory.num_pending == 1003 % 16
    tensors = (memory._pending.keys, memory._pending.values, memory._pending.received) if memory._pending else ()
    assert [each.untyped_storage().nbytes() for each in tensors] == [each.nbytes for each in tensors]
    memory.close()
    assert memory._pending is None
