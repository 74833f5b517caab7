# SPDX-License-Identifier: Apache-2.0
"""What a model's layers make of a text: keys, values and received attention of a past, and queries that look back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kvstore.engines.anatomy import attention_modules, decoder_of, position_rows, rotation_of
from kvstore.engines.loading import LanguageModel
from kvstore.retrieval.tokens import LayerQuery, LayerTokens, Rotate

SINK_TOKENS = 16
WINDOW_TOKENS = 256
RECEIVED_STRIDE = 8
"""Every eighth query says what it pays to earlier keys of its window: evenly spaced, as a session asks."""


@dataclass(frozen=True)
class Layer:
    """One layer of a captured text.

    Args:
        run: all of its tokens.
        num_past: the first ones of them: sinks, middle, window. The others ask.
        query: of those that ask, before RoPE.
        attention: [kv_heads, group, num_queries, num_middle] float32: what each pays to the middle, of 1 in all.
    """

    run: LayerTokens
    num_past: int
    query: LayerQuery
    attention: Tensor

    @property
    def first_near(self) -> int:
        """The first token of the window, where the middle ends."""
        return self.num_past - WINDOW_TOKENS

    @cached_property
    def middle(self) -> LayerTokens:
        """What there is to select from: neither sinks nor window."""
        return self.run.part(SINK_TOKENS, self.first_near)


def capture(language_model: LanguageModel, ids: list[int], num_queries: int) -> list[Layer]:
    """Let a model read a text with full attention; the last `num_queries` tokens ask for what lies before them.

    Args:
        language_model: any model that can be attached.
        ids: the text, more than sinks, window and queries together.
        num_queries: tokens that ask.

    Returns:
        All layers, in order.
    """
    model = language_model.model
    modules = attention_modules(model)
    made: list[dict[str, Tensor]] = [{} for _ in modules]

    def keeper(layer: int, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            made[layer][name] = output.detach()

        return keep

    with torch.inference_mode(), ExitStack() as undo:
        for layer, module in enumerate(modules):
            for name in ("q", "k", "v"):
                last = getattr(module, f"{name}_norm", None) or getattr(module, f"{name}_proj")
                assert isinstance(last, nn.Module), "attention_modules found it"
                undo.callback(last.register_forward_hook(keeper(layer, name)).remove)
        decoder_of(model)(input_ids=torch.tensor([ids], device=language_model.device), use_cache=False)
    rotate = rotation_of(model)
    positions = torch.arange(len(ids)).expand(position_rows(model), -1)
    layers = []
    with torch.inference_mode():
        for module, found in zip(modules, made, strict=True):
            dim: int = module.head_dim  # type: ignore[assignment]
            query, keys, values = (
                found.pop(name).reshape(len(ids), -1, dim).transpose(0, 1).float() for name in ("q", "k", "v")
            )
            grouped = query.unflatten(0, (keys.shape[0], -1))
            layers.append(layer_of(grouped, keys, values, positions, rotate, num_queries))
    return layers


def layer_of(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rotate: Rotate, num_queries: int) -> Layer:
    """Divide one layer's run into what is asked and what asks.

    Args:
        query: [kv_heads, group, num_tokens, key_dim] float32, before RoPE.
        keys: [kv_heads, num_tokens, key_dim] float32, before RoPE.
        values: [kv_heads, num_tokens, value_dim] float32.
        positions: [rows, num_tokens] int64.
        rotate: the model's rotary function.
        num_queries: tokens at the end that ask.
    """
    num_past = keys.shape[1] - num_queries
    rotated_keys = rotate(keys[None], positions[:, None])[0]
    rotated_query = rotate(query.flatten(0, 1)[None], positions[:, None])[0].view_as(query)
    received = received_attention(rotated_query[:, :, :num_past], rotated_keys[:, :num_past])
    run = LayerTokens(
        first=0,
        keys=keys,
        values=values,
        positions=positions,
        received=torch.nn.functional.pad(received, (0, num_queries)),
        groups=torch.full((keys.shape[1],), -1),
        rotate=rotate,
    )
    asking = LayerQuery(query[:, :, num_past:].contiguous(), positions[:, num_past:], rotate, WINDOW_TOKENS)
    attention = causal_attention(rotated_query[:, :, num_past:], rotated_keys, num_past)
    return Layer(run, num_past, asking, attention[..., SINK_TOKENS : num_past - WINDOW_TOKENS].contiguous())


def causal_attention(query: Tensor, keys: Tensor, first: int) -> Tensor:
    """Full attention of rotated queries from token `first` on: `[kv_heads, group, num_queries, num_tokens]` float32."""
    logits = torch.einsum("kgqd,kmd->kgqm", query, keys) * keys.shape[2] ** -0.5
    behind = torch.arange(keys.shape[1]) > torch.arange(first, first + query.shape[2])[:, None]
    attention: Tensor = logits.masked_fill_(behind, float("-inf")).softmax(dim=-1)
    return attention


def received_attention(query: Tensor, keys: Tensor) -> Tensor:
    """What each key gets from every `RECEIVED_STRIDE`th later query less than a window away.

    Args:
        query: [kv_heads, group, num_tokens, key_dim], rotated.
        keys: [kv_heads, num_tokens, key_dim], rotated.

    Returns:
        [kv_heads, num_tokens] float32: sums over queries and over a group's heads.
    """
    num_tokens = keys.shape[1]
    received = torch.zeros(keys.shape[0], num_tokens)
    for first in range(0, num_tokens, WINDOW_TOKENS):
        asking = torch.arange(first, min(first + WINDOW_TOKENS, num_tokens), RECEIVED_STRIDE)
        seen = int(asking[-1]) + 1
        logits = torch.einsum("kgqd,kmd->kgqm", query[:, :, asking], keys[:, :seen]) * keys.shape[2] ** -0.5
        distance = asking[:, None] - torch.arange(seen)
        attention = logits.masked_fill_(distance < 0, float("-inf")).softmax(dim=-1)
        attention *= (distance > 0) & (distance < WINDOW_TOKENS)
        received[:, :seen] += attention.sum(dim=(1, 2))
    return received
