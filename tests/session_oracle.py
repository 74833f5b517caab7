# SPDX-License-Identifier: Apache-2.0
"""A dense oracle of a question: the whole tiny model, where every KV head sees only the tokens that were chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.engines.transformers import Attached
from kvstore.retrieval.estimates import Estimate
from kvstore.retrieval.positions import PositionPolicy
from kvstore.session.branch import Branch
from kvstore.session.reading.past import Reading
from kvstore.store import FetchRequest
from tests.tiny_models import BLOCK_TOKENS


@dataclass
class Choices:
    """What a branch attends to: token numbers by layer, one list for each KV head; the last choice counts."""

    by_layer: dict[int, list[list[int]]] = field(default_factory=dict)
    estimates: dict[int, Estimate | None] = field(default_factory=dict)


def record(monkeypatch: pytest.MonkeyPatch) -> Choices:
    """Record what `Branch` attends to from now on."""
    seen = Choices()
    attend_to: Any = Branch.attend_to
    attend_to_differences: Any = Branch.attend_to_differences

    def recording(
        self: Branch, attending: Any, reading: Reading, layers: range, estimate: Estimate | None = None
    ) -> frozenset[int]:
        if attending is self:
            lists = [[*far.tolist(), *reading.near.tolist()] for far in reading.far]
            assert all(len(set(tokens)) == len(tokens) for tokens in lists), "a token is attended once"
            for layer in layers:
                seen.by_layer[layer] = lists * (2 // len(lists))
                seen.estimates[layer] = estimate
        had: frozenset[int] = attend_to(self, attending, reading, layers, estimate)
        return had

    def recording_differences(self: Branch, readings: dict[int, Reading]) -> dict[int, frozenset[int]]:
        had: dict[int, frozenset[int]] = attend_to_differences(self, readings)
        for layer in had:
            lists = [[*far.tolist(), *readings[layer].near.tolist()] for far in readings[layer].far]
            seen.by_layer[layer] = lists * (2 // len(lists))
        return had

    monkeypatch.setattr(Branch, "attend_to", recording)
    monkeypatch.setattr(Branch, "attend_to_differences", recording_differences)
    return seen


def stored(attached: Attached, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[kv_heads, tokens, dim]` of the whole stream in one layer, from the store."""
    view, layout = attached.session.view, attached.session.view.layout
    slots = torch.zeros(len(view.entries), layout.slot_nbytes, dtype=torch.uint8)
    view.store.fetch([FetchRequest(entry.key, slot, None) for entry, slot in zip(view.entries, slots, strict=True)])
    sizes = [entry.num_tokens for entry in view.entries]
    keys, values = (
        torch.cat([plane[layer, :, :size] for plane, size in zip(planes, sizes, strict=True)], dim=1)
        for planes in (layout.keys(slots), layout.values(slots))
    )
    return keys, values


def oracle(attached: Attached, choices: Choices, ids: Tensor, *, num_near: int, far: int | None = None) -> Tensor:
    """Logits of a prompt that sees the chosen tokens only, KV head by KV head.

    Args:
        attached: the stream.
        choices: tokens by layer and KV head.
        ids: [1, tokens].
        num_near: how many of the last chosen tokens are the recent window.
        far: the one distance of everything else under CONSTANT_FAR.
    """
    model: Any = attached.model
    rotate = attached.session.view.rotate
    named = attached.session.view.policy
    rule = named.position
    assert rotate is not None
    hidden = model.model.embed_tokens(ids)
    view = attached.session.view
    tokens, end = ids.shape[1], view.end_position
    stored_at = torch.cat([view.positions_of(entry) for entry in view.entries], dim=1)[0]
    for number, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            getattr(layer.self_attn, name)(normed).view(1, tokens, -1, 16).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        all_keys, all_values = stored(attached, number)
        outs = []
        for head, chosen in enumerate(choices.by_layer[number]):
            asking, new_key, new_value = query[:, 2 * head : 2 * head + 2], key[:, head], value[:, head]
            past_key, past_value = all_keys[head, chosen], all_values[head, chosen]
            places, start = stored_at[chosen], end
            if rule in (PositionPolicy.CONSECUTIVE, PositionPolicy.SLOT_INDEX, PositionPolicy.SHRINK):
                places, start = torch.arange(len(chosen)), len(chosen)
            if rule is PositionPolicy.PARALLEL:
                places, start = side_by_side(chosen, num_near)
            now = torch.arange(start, start + tokens)
            logits = rotated(rotate, asking, now) @ rotated(rotate, past_key, places).transpose(-1, -2)
            if rule is PositionPolicy.CONSTANT_FAR:
                assert far is not None
                num_far = len(chosen) - num_near
                constant = rotated(rotate, asking, torch.full((tokens,), far))
                logits[..., :num_far] = constant @ past_key[:num_far].transpose(-1, -2)
            if (estimate := choices.estimates[number]) is not None:
                counts = estimate.counts[head]
                guessed = rotated(rotate, asking, now) @ estimate.centroids[head].T + 4.0 * counts.log()
                logits = torch.cat([logits, guessed], dim=-1)
                past_value = torch.cat([past_value, estimate.value_sums[head] / counts[:, None]])
            context = slice(BLOCK_TOKENS, len(chosen) - num_near)
            cooled = logits[..., context] / 4.0 / named.context_temperature
            together = named.context_scale * named.context_temperature - 1
            logits[..., context] = 4.0 * (cooled + together * cooled.logsumexp(dim=-1, keepdim=True))
            own = rotated(rotate, asking, now) @ rotated(rotate, new_key, now).transpose(-1, -2)
            own = own.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), float("-inf"))
            weights = (torch.cat([logits, own], dim=-1) / 4.0).softmax(dim=-1)
            outs.append(weights @ torch.cat([past_value, new_value[0]], dim=0))
        out = torch.cat(outs, dim=1).transpose(1, 2).reshape(1, tokens, -1)
        hidden = hidden + layer.self_attn.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits_out: Tensor = model.lm_head(model.model.norm(hidden))
    return logits_out


def side_by_side(chosen: list[int], num_near: int) -> tuple[Tensor, int]:
    """Places and end where groups of neighbours lie over each other, behind the first one and before the window."""
    places: list[int] = []
    num_far, prefix, longest = len(chosen) - num_near, 0, 0
    for number, token in enumerate(chosen[:num_far]):
        follows = number > 0 and token == chosen[number - 1] + 1
        if number > 0 and not follows:
            prefix = prefix or longest
        places.append(places[-1] + 1 if follows else prefix)
        longest = max(longest, places[-1] + 1)
    return torch.tensor([*places, *range(longest, longest + num_near)]), longest + num_near


def rotated(rotate: Any, vectors: Tensor, positions: Tensor) -> Tensor:
    """Vectors `[..., tokens, 16]` at positions `[tokens]`."""
    flat = vectors.reshape(1, -1, *vectors.shape[-2:])
    moved: Tensor = rotate(flat, positions[None, None]).view_as(vectors)
    return moved
