# SPDX-License-Identifier: Apache-2.0
"""The policy `ape` against its source's rule, written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvstore.errors import ConfigError
from kvstore.kernels.parts_reference import attend_part, context_part, merge_parts
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.positions import PositionPolicy, place
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens, rotate

PREFIX, PAGE, DIM = 6, 128, 16


@pytest.mark.parametrize(("temperature", "context_scale"), [(0.9, 0.9), (0.5, 0.8), (1.0, 0.7), (1.0, 1.0)])
def test_ape_attends_to_contexts_side_by_side_with_a_temperature_and_a_scale(
    temperature: float, context_scale: float
) -> None:
    policy = replace(policy_named("ape"), context_temperature=temperature, context_scale=context_scale)
    stream, query = layer_tokens(PREFIX + 8 * PAGE), layer_query(1)
    keys = stream.keys.clone()
    for page in (1, 3, 6):  # contexts that lie apart, and fit the question
        keys[:, PREFIX + page * PAGE : PREFIX + (page + 1) * PAGE] += query.query.sum(dim=1) / 8
    stream = replace(stream, keys=keys)
    memory = LayerMemory(policy, 2, DIM)
    memory.add(stream.part(PREFIX, stream.num_tokens), is_end=True)
    found = memory.select(query, 3 * PAGE).tokens[0]
    contexts = found.split(PAGE)
    assert [int(context[0] - PREFIX) // PAGE for context in contexts] == [1, 3, 6]

    # As the source has it: every context begins behind the prefix, and the question behind the longest.
    asking = rotate(query.query.flatten(0, 1)[None], torch.tensor([[[PREFIX + PAGE]]]))[0, :, 0]
    wanted = torch.zeros(6, DIM)
    for head in range(6):
        keys, values = stream.keys[head // 3], stream.values[head // 3]
        weights: list[tuple[float, int]] = []
        for place_of, token in enumerate(range(PREFIX)):
            key = rotate(keys[None, None, token : token + 1], torch.tensor([[[place_of]]]))[0, 0, 0]
            weights.append((math.exp(float(asking[head] @ key) / 4), token))
        powers = []
        for context in contexts:
            for inside, token in enumerate(context.tolist()):
                key = rotate(keys[None, None, token : token + 1], torch.tensor([[[PREFIX + inside]]]))[0, 0, 0]
                powers.append((math.exp(float(asking[head] @ key) / 4 / temperature), token))
        together = sum(power for power, _ in powers)
        weights += [(power / together * together ** (context_scale * temperature), token) for power, token in powers]
        whole = sum(weight for weight, _ in weights)
        wanted[head] = torch.stack([weight / whole * values[token] for weight, token in weights]).sum(dim=0)

    groups = [stream.positions[:, :PREFIX], *(stream.positions[:, context] for context in contexts)]
    end = stream.num_tokens
    placement = place(policy.position, groups, [], rows=1, stream_end=end, tail_start=0, far_position=0)
    assert placement.offset == PREFIX + PAGE
    past = torch.cat([torch.arange(PREFIX), found])
    keys = rotate(stream.keys[None, :, past], placement.past[:, None])
    values = stream.values[None, :, past]
    at_end = torch.tensor([[[placement.offset]]])
    turned = rotate(query.query.flatten(0, 1)[None], at_end)
    prefix = attend_part(turned, keys[:, :, :PREFIX], values[:, :, :PREFIX], mask=None, scale=0.25)
    part = context_part(
        turned,
        keys[:, :, PREFIX:],
        values[:, :, PREFIX:],
        temperature=policy.context_temperature,
        context_scale=policy.context_scale,
        mask=None,
        scale=0.25,
    )
    torch.testing.assert_close(merge_parts([prefix, part])[0][0, :, 0], wanted, atol=1e-5, rtol=1e-4)


def test_a_context_of_nothing_weighs_nothing() -> None:
    query, keys = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 3, 4)
    nothing = context_part(
        query, keys[:, :, :0], keys[:, :, :0], temperature=0.5, context_scale=0.5, mask=None, scale=1.0
    )
    other = attend_part(query, keys, keys, mask=None, scale=1.0)
    torch.testing.assert_close(merge_parts([nothing, other])[0], other[0])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_or_scale_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="context_temperature is"):
        replace(policy_named("ape"), context_temperature=value)
    with pytest.raises(ConfigError, match="context_scale is"):
        replace(policy_named("ape"), context_scale=value)


def test_a_context_rule_goes_with_plain_attention_to_the_rest_only() -> None:
    changes: list[dict[str, Any]] = [
        {"position": PositionPolicy.CONSTANT_FAR},
        {"position": PositionPolicy.ORIGINAL, "estimated_share": 0.2},
        {"retrieves_while_appending": True},
    ]
    for change in changes:
        with pytest.raises(ConfigError, match="temperature of the context"):
            replace(policy_named("ape"), **change)
