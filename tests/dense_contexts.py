# SPDX-License-Identifier: Apache-2.0
"""A store with contexts of a tiny model, and the answer that dense attention gives to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import kvstore
from kvstore.face import KVStore
from tests.tiny_models import BLOCK_TOKENS, token_ids

PREFIX, DOCUMENTS = token_ids(16, seed=2), [token_ids(count, seed=40 + count) for count in (29, 45, 8)]
NAMES = ["a", "b", "c"]
QUESTION = token_ids(7, seed=9)


@contextmanager
def opened(path: Path, model: Any, access: kvstore.Access = kvstore.Access.WRITE) -> Iterator[KVStore]:
    with (
        torch.no_grad(),
        kvstore.open(
            path,
            kvstore.spec_of(model),
            access=access,
            block_tokens=BLOCK_TOKENS,
            host_nbytes=4 << 20,
            durability=kvstore.Durability.NONE,
        ) as store,
    ):
        yield store


def dense(
    model: Any,
    parts: Sequence[tuple[Tensor, int]],
    prefix: Tensor,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    seen: Sequence[int] | None = None,
) -> Tensor:
    """Logits of the question, as the engine computes each context by itself, and attention as APE has it.

    Args:
        model: a Llama.
        parts: contexts, and at which position each begins.
        prefix: [1, num_tokens], before each of them.
        temperature: of the contexts.
        scale: likewise.
        seen: tokens of prefix and contexts that the question sees; None for all.
    """
    num_prefix, caches = prefix.shape[1], list[Any]()
    for tokens, _ in parts:
        caches.append(DynamicCache())
        model(torch.cat([prefix, tokens], dim=1), past_key_values=caches[-1])
    start = max([num_prefix, *(first + tokens.shape[1] for tokens, first in parts)])
    hidden, number = model.model.embed_tokens(QUESTION), QUESTION.shape[1]
    causal = torch.ones(number, number, dtype=torch.bool).tril()
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            getattr(attention, f"{kind}_proj")(normed).unflatten(2, (-1, 16)).transpose(1, 2) for kind in "qkv"
        )
        now = torch.arange(start, start + number)
        query, key = moved(model, query, now), moved(model, key, now)
        keys = [caches[0].layers[index].keys[:, :, :num_prefix]]
        values = [caches[0].layers[index].values[:, :, :num_prefix]]
        for cache, (_, first) in zip(caches, parts, strict=True):
            by = first - num_prefix
            had = cache.layers[index].keys[:, :, num_prefix:]
            keys.append(moved(model, had, torch.full((had.shape[2],), by)))  # rotations add up
            values.append(cache.layers[index].values[:, :, num_prefix:])
        past_keys, past_values = (torch.cat(each, dim=2).repeat_interleave(2, dim=1) for each in (keys, values))
        logits = query @ past_keys.transpose(-1, -2) / 4
        if seen is not None:
            unseen = [token for token in range(logits.shape[3]) if token not in seen]
            logits[..., unseen] = float("-inf")
        cooled = logits[..., num_prefix:] / temperature
        together = cooled.logsumexp(dim=-1, keepdim=True)
        logits = torch.cat([logits[..., :num_prefix], cooled - together + scale * temperature * together], dim=-1)
        own = (query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) / 4).masked_fill(~causal, float("-inf"))
        weights = torch.cat([logits, own], dim=-1).softmax(dim=-1)
        out = weights @ torch.cat([past_values, value.repeat_interleave(2, dim=1)], dim=2)
        hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits_out: Tensor = model.lm_head(model.model.norm(hidden))
    return logits_out


def moved(model: Any, vectors: Tensor, by: Tensor) -> Tensor:
    """Rotate `[1, heads, tokens, 16]` by positions `[tokens]`."""
    cos, sin = model.model.rotary_emb(vectors, by[None])
    half = torch.cat([-vectors[..., 8:], vectors[..., :8]], dim=-1)
    turned: Tensor = vectors * cos[:, None] + half * sin[:, None]
    return turned
