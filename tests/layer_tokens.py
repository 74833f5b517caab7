# SPDX-License-Identifier: Apache-2.0
"""Random keys and queries of one layer, with a rotary function: what tests of retrieval strategies look at."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.retrieval.tokens import LayerQuery, LayerTokens

THETA = 10_000.0


def rotate(vectors: Tensor, positions: Tensor) -> Tensor:
    """NeoX halves; of several rows of positions, the first one counts."""
    half = vectors.shape[-1] // 2
    angle = positions[0][:, None, :, None].float() / THETA ** (torch.arange(half) / half)
    low, high = vectors.split(half, dim=-1)
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)


def layer_tokens(
    num_tokens: int, *, kv_heads: int = 2, dim: int = 16, first: int = 0, seed: int = 0, group_tokens: int = 0
) -> LayerTokens:
    """Tokens of a stream; frames of `group_tokens` each, unless that is 0."""
    chance = torch.Generator().manual_seed(seed)
    numbers = torch.arange(first, first + num_tokens)
    return LayerTokens(
        first=first,
        keys=torch.randn(kv_heads, num_tokens, dim, generator=chance),
        values=torch.randn(kv_heads, num_tokens, dim, generator=chance),
        positions=numbers[None],
        received=torch.rand(kv_heads, num_tokens, generator=chance),
        groups=numbers // group_tokens if group_tokens else torch.full((num_tokens,), -1),
        rotate=rotate,
    )


def layer_query(
    num_tokens: int, *, kv_heads: int = 2, group: int = 3, dim: int = 16, first: int = 1000, seed: int = 1
) -> LayerQuery:
    """Queries from position `first` on."""
    chance = torch.Generator().manual_seed(seed)
    query = torch.randn(kv_heads, group, num_tokens, dim, generator=chance)
    return LayerQuery(query, torch.arange(first, first + num_tokens)[None], rotate, far_position=64)
