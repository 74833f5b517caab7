# SPDX-License-Identifier: Apache-2.0
"""The policies `streaming_llm` and `streaming_vlm` against their sources' rules, written out."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.kernels.reference import attend
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy, place
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import rotate

SINKS, WINDOW, DIM = 4, 9, 16


def rotated(vectors: Tensor, positions: Tensor) -> Tensor:
    """`[heads, tokens, dim]` at `[tokens]`, in one batch."""
    return rotate(vectors[None], positions[None, None])


def by_policy(policy: Policy, query: Tensor, keys: Tensor, values: Tensor, step: int) -> Tensor:
    """Attention of the token `step` to sinks, window and itself, where the policy places them."""
    past = [*range(SINKS), *range(max(SINKS, step - WINDOW), step)]
    numbers = torch.tensor([past])
    placement = place(
        policy.position,
        [numbers[:, :SINKS]],
        [numbers[:, SINKS:]],
        rows=1,
        stream_end=step,
        tail_start=step,
        far_position=0,
    )
    own = torch.tensor([step + placement.offset])
    read = [*past, step]
    all_keys = rotated(keys[:, read], torch.cat([placement.past[0], own]))
    return attend(rotated(query[:, step : step + 1], own), all_keys, values[None, :, read], mask=None, scale=DIM**-0.5)


def test_streaming_llm_attends_as_its_source_does_token_by_token() -> None:
    chance = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, 40, DIM, generator=chance) for _ in range(3))
    policy = policy_named("streaming_llm")
    cached: list[int] = []
    for step in range(40):
        cached.append(step)
        places = torch.arange(len(cached))
        out = attend(
            rotated(query[:, step : step + 1], places[-1:]),
            rotated(keys[:, cached], places),
            values[None, :, cached],
            mask=None,
            scale=DIM**-0.5,
        )
        if step > SINKS:
            torch.testing.assert_close(by_policy(policy, query, keys, values, step), out)
        if len(cached) > SINKS + WINDOW:
            cached = cached[:SINKS] + cached[-WINDOW:]


def test_streaming_policies_retrieve_nothing() -> None:
    for name in ("streaming_llm", "streaming_vlm"):
        policy = policy_named(name)
        assert policy.segmenter is None
        assert policy.views == ()
        assert policy.recent_tokens >= 512
    assert policy_named("streaming_llm").position is PositionPolicy.SLOT_INDEX


def rope_index(parts: list[tuple[int, int] | int]) -> list[Tensor]:
    """How the source counts: texts of so many tokens, and frames of rows and columns, one behind the other."""
    found, start = [], 0
    for part in parts:
        if isinstance(part, int):
            found.append(torch.arange(start, start + part).expand(3, -1))
        else:
            cells = [(start, start + row, start + column) for row in range(part[0]) for column in range(part[1])]
            found.append(torch.tensor(cells).T)
        start = int(found[-1].max()) + 1
    return found


def test_streaming_vlm_counts_what_is_left_as_if_nothing_else_had_been() -> None:
    stream: list[tuple[int, int] | int] = [5]
    for chunk in range(12):
        stream += [2, (3 + chunk % 2, 5), 4 + chunk]
    positions = rope_index(stream)
    for recent in (1, 4, 9):
        left = [0, *range(len(stream) - recent, len(stream))]
        wanted = rope_index([stream[number] for number in left])
        placement = place(
            policy_named("streaming_vlm").position,
            [positions[0]],
            [positions[number] for number in left[1:]],
            rows=3,
            stream_end=int(positions[-1].max()) + 1,
            tail_start=0,
            far_position=0,
        )
        assert torch.equal(placement.past, torch.cat(wanted, dim=1))
        assert placement.offset == int(wanted[-1].max()) + 1
