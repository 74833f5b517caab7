# SPDX-License-Identifier: Apache-2.0
"""Lets a model answer while its layers see only sinks, window, what was chosen, and the question itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from kvstore.engines.anatomy import attention_modules, decoder_of, position_rows
from kvstore.engines.loading import LanguageModel
from kvstore.kernels.reference import attend
from kvstore.retrieval.positions import PositionPolicy, place
from kvstore.retrieval.tokens import LayerQuery, Rotate
from recall.capture import SINK_TOKENS, WINDOW_TOKENS, Layer
from recall.choosers import Choose
from recall.metrics import FULL_LAYERS
from recall.prompts import Prompt

Seen = tuple[tuple[Tensor, ...], Tensor]
"""(for each KV head, numbers of sinks and of what was chosen; numbers of the window and of what follows it)."""


def right_answers(
    language_model: LanguageModel,
    layers: Sequence[Layer],
    prompt: Prompt,
    chooses: Sequence[Choose] | None,
    position: PositionPolicy,
    budget: int,
) -> list[bool]:
    """Say for each note of a prompt whether greedy decoding would say it.

    All tokens behind the past go through the model at once, which gives each what it gets when they come one by one;
    every one of them chooses for itself in every layer, but in the first ones, which see everything.

    Args:
        language_model: what the prompt was captured with.
        layers: the captured prompt.
        prompt: with notes.
        chooses: who chooses in each layer; None sees everything in all.
        position: where what was chosen is read.
        budget: tokens to choose, per layer and KV head.
    """
    behind = prompt.ids[len(prompt.ids) - prompt.num_queries :]
    model = language_model.model
    with torch.inference_mode(), _reading(model, layers, chooses, position, budget):
        positions = torch.arange(layers[0].num_past, len(prompt.ids), device=language_model.device)
        rows = position_rows(model)
        hidden = decoder_of(model)(
            input_ids=torch.tensor([behind], device=language_model.device),
            position_ids=positions[None] if rows == 1 else positions.expand(rows, 1, -1),
            use_cache=False,
        ).last_hidden_state
        said = model.get_output_embeddings()(hidden)[0].argmax(-1).tolist()
    right = []
    for ask in prompt.asks:
        wanted = [*behind, prompt.next_id][ask.answer]
        right.append(said[ask.answer.start - 1 : ask.answer.stop - 1] == wanted)
    return right


@contextmanager
def _reading(
    model: Any, layers: Sequence[Layer], chooses: Sequence[Choose] | None, position: PositionPolicy, budget: int
) -> Iterator[None]:
    """Let every attention module read from a captured past."""
    with ExitStack() as undo:
        for number, (module, layer) in enumerate(zip(attention_modules(model), layers, strict=True)):
            choose = chooses[number] if chooses is not None and number >= FULL_LAYERS else None
            module.forward = _Reader(module, layer, choose, position, budget)
            undo.callback(delattr, module, "forward")
        yield


class _Reader:
    """Stands for an attention module's `forward`."""

    def __init__(self, module: Any, layer: Layer, choose: Choose | None, position: PositionPolicy, budget: int) -> None:
        self._module = module
        self._layer = layer
        self._choose = choose
        self._position = position
        self._budget = budget

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        layer = self._layer
        query, keys, values = (self._projected(hidden_states, name) for name in ("q", "k", "v"))
        past = Past(
            torch.cat([layer.run.keys[:, : layer.num_past], keys], dim=1),
            torch.cat([layer.run.values[:, : layer.num_past], values], dim=1),
            layer.query.rotate,
            layer.query.positions.shape[0],
        )
        if self._choose is None:
            out = past.attend_to_all(query, layer.num_past)
        else:
            seen = self._seen(query.unflatten(0, (keys.shape[0], -1)))
            if self._position is PositionPolicy.ORIGINAL:
                out = past.attend_in_place(query, seen, layer.num_past)
            else:
                out = torch.stack(
                    [past.attend(query[:, token], far, near, self._position) for token, (far, near) in enumerate(seen)],
                    dim=1,
                )
        joined = out.transpose(0, 1).flatten(1)[None].to(hidden_states.dtype)
        return self._module.o_proj(joined), None

    def _seen(self, query: Tensor) -> list[Seen]:
        """What each token of `[kv_heads, group, num_queries, key_dim]` queries sees."""
        layer = self._layer
        assert self._choose is not None, "it does not see everything"
        sinks = torch.arange(SINK_TOKENS)
        seen: list[Seen] = []
        for token in range(query.shape[2]):
            one = slice(token, token + 1)
            positions = layer.query.positions[:, one]
            asking = LayerQuery(query[:, :, one], positions, layer.query.rotate, WINDOW_TOKENS)
            chosen = self._choose(asking, self._budget)
            near = torch.arange(layer.first_near, layer.num_past + token + 1)
            seen.append((tuple(torch.cat([sinks, each]) for each in chosen), near))
        return seen

    def _projected(self, hidden_states: Tensor, name: str) -> Tensor:
        module = self._module
        made = getattr(module, f"{name}_proj")(hidden_states[0])
        made = made.unflatten(-1, (-1, module.head_dim))
        norm = getattr(module, f"{name}_norm", None)
        made = made if norm is None else norm(made)
        found: Tensor = made.transpose(0, 1).float()
        return found


class Past:
    """Keys and values of one layer, from the stream's first token on.

    Args:
        keys: [kv_heads, num_tokens, key_dim] float32, before RoPE unless `rotate` is None.
        values: [kv_heads, num_tokens, value_dim] float32.
        rotate: the model's rotary function.
        rows: of its positions.
    """

    def __init__(self, keys: Tensor, values: Tensor, rotate: Rotate | None, rows: int = 1) -> None:
        self._keys = keys
        self._values = values
        self._rotate = rotate
        self._rows = rows
        self._scale = keys.shape[2] ** -0.5
        self._rotated = self._turned(keys, torch.arange(keys.shape[1]))

    def attend_to_all(self, query: Tensor, first: int) -> Tensor:
        """Full attention of tokens from `first` on: `[num_heads, num_queries, key_dim]` before RoPE."""
        numbers = torch.arange(first, first + query.shape[1])
        mask = torch.arange(self._keys.shape[1]) <= numbers[:, None]
        rotated = self._turned(query, numbers)
        parts = (part[None] for part in (rotated, self._rotated, self._values))
        return attend(*parts, mask=mask[None, None], scale=self._scale)[0]

    def attend_in_place(self, query: Tensor, seen: Sequence[Seen], first: int) -> Tensor:
        """Attention of tokens from `first` on, each to what it sees, at original positions; see `attend`."""
        kv_heads, num_tokens = self._keys.shape[:2]
        mask = torch.zeros(kv_heads, len(seen), num_tokens, dtype=torch.bool)
        for token, (far, near) in enumerate(seen):
            mask[:, token, near] = True
            for head, numbers in enumerate(far):
                mask[head, token, numbers] = True
        rotated = self._turned(query, torch.arange(first, first + query.shape[1])).unflatten(0, (kv_heads, -1))
        logits = torch.einsum("kgqd,kmd->kgqm", rotated, self._rotated) * self._scale
        weights = logits.masked_fill_(~mask[:, None], float("-inf")).softmax(dim=-1)
        return torch.einsum("kgqm,kmd->kgqd", weights, self._values).flatten(0, 1)

    def attend(self, query: Tensor, far: Sequence[Tensor], near: Tensor, position: PositionPolicy) -> Tensor:
        """Attention of one token to some tokens, which a position policy places.

        Args:
            query: [num_heads, key_dim] float32, before RoPE; of the last token of `near`.
            far: for each KV head, numbers of the sinks and of what was chosen, ascending.
            near: numbers of the window and of what follows it.
            position: the policy; each run of tokens without a gap is a segment.

        Returns:
            [num_heads, value_dim] float32.
        """
        attended = []
        for head, one in enumerate(query.unflatten(0, (self._keys.shape[0], -1)).unsqueeze(2)):
            tokens = torch.cat([far[head], near])
            runs = far[head].tensor_split((far[head].diff() != 1).nonzero()[:, 0] + 1)
            placement = place(
                position,
                [run.expand(self._rows, -1) for run in runs],
                [near.expand(self._rows, -1)],
                rows=self._rows,
                stream_end=int(near[-1]) + 1,
                tail_start=int(near[-1]) + 1,
                far_position=WINDOW_TOKENS,
            )
            keys = self._keys[head, tokens][None]
            logits = self._turned(one, placement.past[0, -1:])[:, 0] @ self._turned(keys, placement.past[0])[0].T
            if placement.num_far:
                afar = self._turned(one, torch.tensor([placement.far_position]))[:, 0]
                logits[:, : placement.num_far] = afar @ keys[0, : placement.num_far].T
            attended.append((logits * self._scale).softmax(dim=-1) @ self._values[head, tokens])
        return torch.cat(attended)

    def _turned(self, rows: Tensor, places: Tensor) -> Tensor:
        """Rotate `[heads, num_tokens, key_dim]` to `[num_tokens]` places."""
        if self._rotate is None:
            return rows
        return self._rotate(rows[None], places.expand(self._rows, 1, -1))[0]
