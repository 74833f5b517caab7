# SPDX-License-Identifier: Apache-2.0
"""Who chooses what is read: a policy, and what it is compared with: true attention, the latest tokens, chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.selectors.budget import TokenBudget
from kvstore.retrieval.tokens import LayerQuery, Space
from kvstore.retrieval.units import Segmenter
from recall.capture import Layer

Choose = Callable[[LayerQuery, int], tuple[Tensor, ...]]
"""(queries, budget in tokens) -> numbers of the tokens to read, `[num_chosen]` int64 for each KV head."""

CHANCE_PAGE = 16


class Chooser(Protocol):
    """Chooses from the middle of a captured text."""

    @property
    def name(self) -> str:
        """For the report."""

    @property
    def position(self) -> PositionPolicy:
        """Where what was chosen is read."""

    def over(self, number: int, layer: Layer) -> Choose:
        """Look at layer `number`, and be ready to choose from it."""


def prepared(chooser: Chooser, layers: Sequence[Layer]) -> list[Choose]:
    """Look at all layers of a text, once for all that is asked of them."""
    return [chooser.over(number, layer) for number, layer in enumerate(layers)]


@dataclass(frozen=True)
class ByPolicy:
    """A policy that retrieves."""

    policy: Policy

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def position(self) -> PositionPolicy:
        return self.policy.position

    @property
    def segmenter(self) -> Segmenter:
        assert self.policy.segmenter is not None, "it retrieves"
        return self.policy.segmenter

    def over(self, number: int, layer: Layer) -> Choose:
        kv_heads, _, key_dim = layer.run.keys.shape
        memory = LayerMemory(self.policy, kv_heads, key_dim, layer=number)
        memory.add(layer.middle, is_end=True)

        def choose(query: LayerQuery, budget_tokens: int) -> tuple[Tensor, ...]:
            found = memory.select(query, budget_tokens).tokens
            return found if len(found) == kv_heads else found * kv_heads

        return choose


@dataclass(frozen=True)
class Oracle:
    """The units that get most attention of a KV head's queries: what no score over these units can surpass."""

    segmenter: Segmenter
    position = PositionPolicy.ORIGINAL

    @property
    def name(self) -> str:
        return f"oracle over {self.segmenter}"

    def over(self, number: int, layer: Layer) -> Choose:
        middle = layer.middle
        kv_heads, num_tokens = middle.keys.shape[:2]
        units = list(self.segmenter.cut(middle, is_end=True))
        units *= kv_heads if len(units) == 1 else 1
        order = torch.stack([each.tokens for each in units]) - middle.first
        unit = torch.stack([each.unit_of_place() for each in units])
        sizes = torch.stack([each.sizes for each in units])

        def choose(query: LayerQuery, budget_tokens: int) -> tuple[Tensor, ...]:
            last = int(query.positions[0, -1])
            asking = query.in_space(Space.ROTATED, slice(-1, None))[:, :, 0]
            logits = asking @ layer.run.rotated[:, : last + 1].transpose(1, 2) * asking.shape[2] ** -0.5
            paid = logits.softmax(dim=-1).sum(dim=1)[:, middle.first : middle.first + num_tokens]
            per_unit = torch.zeros(kv_heads, sizes.shape[1]).scatter_add_(1, unit, paid.gather(1, order))
            chosen = TokenBudget().select(per_unit, sizes, budget_tokens).gather(1, unit)
            return tuple(
                tokens[is_read].sort().values + middle.first for tokens, is_read in zip(order, chosen, strict=True)
            )

        return choose


@dataclass(frozen=True)
class Recent:
    """The tokens right before the window."""

    name = "recent"
    position = PositionPolicy.ORIGINAL

    def over(self, number: int, layer: Layer) -> Choose:
        first, end = layer.middle.first, layer.first_near
        return lambda query, budget: (torch.arange(max(end - budget, first), end),) * layer.run.keys.shape[0]


@dataclass(frozen=True)
class Chance:
    """Random pages, others for each KV head and query."""

    name = "random"
    position = PositionPolicy.ORIGINAL

    def over(self, number: int, layer: Layer) -> Choose:
        generator = torch.Generator().manual_seed(number)
        first, num_pages = layer.middle.first, layer.middle.num_tokens // CHANCE_PAGE

        def choose(query: LayerQuery, budget_tokens: int) -> tuple[Tensor, ...]:
            pages = [
                torch.randperm(num_pages, generator=generator)[: budget_tokens // CHANCE_PAGE].sort().values
                for _ in range(layer.run.keys.shape[0])
            ]
            return tuple((each[:, None] * CHANCE_PAGE + torch.arange(CHANCE_PAGE)).flatten() + first for each in pages)

        return choose
