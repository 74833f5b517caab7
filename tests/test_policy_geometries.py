# SPDX-License-Identifier: Apache-2.0
"""Every policy over random models: with room for everything, what a question sees is all of the stream, once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvstore
from kvstore.face import KVStore
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policies

BLOCK = 16
NUM_TOKENS = 5 * BLOCK + 7
NUM_ASKING = 3
CHANGES_ATTENTION = ("ape", "infllm", "livevlm", "streaming_llm", "streaming_vlm", "streamkv")
"""These read less than the budget allows, or place it where attention is another."""


def rotate(vectors: Tensor, positions: Tensor) -> Tensor:
    """NeoX halves; of three rows of positions, each turns a third of the pairs, as M-RoPE has it."""
    half = vectors.shape[-1] // 2
    section = torch.arange(half) * positions.shape[0] // half
    turned = positions[section].permute(1, 2, 0).float()  # [batch, tokens, half]
    angle = (turned / 10_000.0 ** (torch.arange(half) / half))[:, None]
    low, high = vectors.float().split(half, dim=-1)
    joined = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)
    return joined.to(vectors.dtype)


def open_folder(folder: str, spec: kvstore.ModelSpec) -> KVStore:
    """A small store."""
    durability = kvstore.Durability.NONE
    return kvstore.open(Path(folder), spec, block_tokens=BLOCK, host_nbytes=4 << 20, durability=durability)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """KV heads, query heads for each, key dim, value dim, rows of positions."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    group = draw(st.sampled_from([1, 2, 7, 16]))
    key_dim = draw(st.sampled_from([32, 64, 96, 256]))
    value_dim = draw(st.sampled_from([key_dim, 32, 128]))
    return kv_heads, group, key_dim, value_dim, draw(st.sampled_from([1, 3]))


@pytest.mark.parametrize("name", sorted(set(policies()) - set(CHANGES_ATTENTION)))
@settings(max_examples=5, deadline=None)
@given(geometry=geometries(), seed=st.integers(0, 1000))
def test_with_room_for_everything_attention_is_full(
    name: str, geometry: tuple[int, int, int, int, int], seed: int
) -> None:
    kv_heads, group, key_dim, value_dim, rows = geometry
    chance = torch.Generator().manual_seed(seed)
    scale = key_dim**-0.5
    spec = kvstore.ModelSpec(2, kv_heads, key_dim, value_dim, "float32", "pre", "mine", "{}", str(geometry))

    def made(count: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((kv_heads * group, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        query, keys, values = (torch.randn(1, heads, count, dim, generator=chance) for heads, dim in shapes)
        return query, keys, values

    steps = torch.randint(1, 3, (rows, NUM_TOKENS), generator=chance).cumsum(1) if rows > 1 else None
    where = (torch.arange(NUM_TOKENS)[None] if steps is None else steps)[:, None]
    stream_layers = [made(NUM_TOKENS) for _ in range(2)]
    asked = [made(NUM_ASKING) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder, open_folder(folder, spec) as store:
        stream = store.stream("s", policy=name, budget_tokens=10_000, sink_tokens=4, device_nbytes=4 << 20)
        stream.bind(rotate, torch.device("cpu"), rows)
        for first in range(0, NUM_TOKENS, 29):
            part = slice(first, first + 29)
            for layer, (query, keys, values) in enumerate(stream_layers):
                at, ids = where[:, :, part], torch.arange(NUM_TOKENS)[part]
                stream.attend(layer, query[:, :, part], keys[:, :, part], values[:, :, part], at, ids=ids, scale=scale)
        stream.commit()
        now = torch.arange(NUM_ASKING).expand(rows, 1, -1)
        with stream.recalling():
            for layer, tensors in enumerate(asked):
                stream.attend(layer, *tensors, now, ids=torch.arange(NUM_ASKING), scale=scale)
        with stream.asking():
            had = [
                stream.attend(layer, *asked[layer], now, ids=torch.arange(NUM_ASKING), scale=scale) for layer in (0, 1)
            ]
        assert stream.last.num_attended_tokens == NUM_TOKENS
    behind = now + where.max() + 1
    for layer in (0, 1):
        query, keys, values = asked[layer]
        all_keys = torch.cat([rotate(stream_layers[layer][1], where), rotate(keys, behind)], dim=2)
        all_values = torch.cat([stream_layers[layer][2], values], dim=2).repeat_interleave(group, dim=1)
        logits = rotate(query, behind) @ all_keys.repeat_interleave(group, dim=1).transpose(2, 3) * scale
        hidden = torch.ones(NUM_ASKING, NUM_ASKING).triu(1).bool()
        logits[..., NUM_TOKENS:].masked_fill_(hidden, float("-inf"))
        torch.testing.assert_close(had[layer], logits.softmax(-1) @ all_values, atol=2e-4, rtol=2e-4)


def test_what_changes_attention_says_why() -> None:
    for name in set(CHANGES_ATTENTION) & set(policies()):
        policy = policies()[name]
        is_moved = policy.position not in (PositionPolicy.ORIGINAL, PositionPolicy.CONSECUTIVE)
        assert is_moved or not policy.retrieves or name in ("livevlm", "streamkv")
