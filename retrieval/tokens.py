# SPDX-License-Identifier: Apache-2.0
"""What strategies look at: a run of a stream's tokens in one layer, and the queries that ask for some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kvstore.errors import ConfigError


class Rotate(Protocol):
    """The model's own rotary function."""

    def __call__(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Rotate `[batch, heads, tokens, dim]` to `positions` `[rows, batch, tokens]` int64; keeps the dtype."""


class Space(StrEnum):
    """Where keys and queries are compared.

    PLAIN: both before RoPE: what is said counts, not where.
    ROTATED: both at their original positions, as attention will see them.
    FAR: keys before RoPE, queries at one distance from all of them (InfLLM, arXiv:2402.04617).
    """

    PLAIN = "plain"
    ROTATED = "rotated"
    FAR = "far"


# Not slotted: what is derived is kept beside the fields, because several strategies ask for it.
@dataclass(frozen=True)
class LayerTokens:
    """A run of consecutive tokens of a stream, in one layer.

    Args:
        first: number of the first one in the stream.
        keys: [kv_heads, num_tokens, key_dim], any float dtype, before RoPE unless `rotate` is None.
        values: [kv_heads, num_tokens, value_dim].
        positions: [rows, num_tokens] int64 RoPE positions; rows is 1, or 3 for M-RoPE.
        received: [kv_heads, num_tokens] float32: attention that later tokens paid to each, summed over a query group.
        groups: [num_tokens] int64: frame group of each, -1 for text.
        rotate: the model's rotary function; None where keys come rotated.
    """

    first: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    received: Tensor
    groups: Tensor
    rotate: Rotate | None

    @property
    def num_tokens(self) -> int:
        """Tokens in the run."""
        return self.keys.shape[1]

    @cached_property
    def plain(self) -> Tensor:
        """Keys before RoPE: `[kv_heads, num_tokens, key_dim]` float32.

        Raises:
            ConfigError: they are stored rotated.
        """
        if self.rotate is None:
            raise ConfigError("keys are stored rotated; a policy that compares them before RoPE does not fit")
        return self.keys.float()

    @cached_property
    def rotated(self) -> Tensor:
        """Keys at their original positions: `[kv_heads, num_tokens, key_dim]` float32."""
        if self.rotate is None:
            return self.keys.float()
        return self.rotate(self.keys.float()[None], self.positions[:, None].to(self.keys.device))[0]

    def in_space(self, space: Space) -> Tensor:
        """Keys in a space: `[kv_heads, num_tokens, key_dim]` float32; raises like `plain`."""
        return self.rotated if space is Space.ROTATED else self.plain

    def part(self, start: int, end: int) -> LayerTokens:
        """Tokens `start` to `end`, counted in this run."""
        part = slice(start, end)
        return LayerTokens(
            self.first + start,
            self.keys[:, part],
            self.values[:, part],
            self.positions[:, part],
            self.received[:, part],
            self.groups[part],
            self.rotate,
        )

    def copied(self) -> LayerTokens:
        """The same in memory of its own."""
        return LayerTokens(
            self.first,
            self.keys.clone(),
            self.values.clone(),
            self.positions.clone(),
            self.received.clone(),
            self.groups.clone(),
            self.rotate,
        )

    def followed_by(self, other: LayerTokens) -> LayerTokens:
        """This run and the one behind it as one."""
        return LayerTokens(
            self.first,
            torch.cat([self.keys, other.keys], dim=1),
            torch.cat([self.values, other.values], dim=1),
            torch.cat([self.positions, other.positions], dim=1),
            torch.cat([self.received, other.received], dim=1),
            torch.cat([self.groups, other.groups]),
            self.rotate,
        )


@dataclass(frozen=True)
class LayerQuery:
    """Queries of one layer.

    Args:
        query: [kv_heads, group, num_tokens, key_dim]: heads grouped by the KV head that they read; before RoPE unless
            `rotate` is None.
        positions: [rows, num_tokens] int64.
        rotate: as in `LayerTokens`.
        far_position: where queries stand in `Space.FAR`.
        turns: what `last_turns` has found, to be shared by queries that stand at the same positions.
    """

    query: Tensor
    positions: Tensor
    rotate: Rotate | None
    far_position: int = 0
    turns: dict[tuple[Space, ...], Tensor | None] = field(default_factory=dict, compare=False)

    @staticmethod
    def joined(queries: Sequence[LayerQuery]) -> LayerQuery:
        """Those of several layers of one forward: the KV heads of one behind those of the other."""
        return replace(queries[0], query=torch.cat([each.query for each in queries]))

    def by_layer(self, num_layers: int) -> list[LayerQuery]:
        """Part what `joined` joined."""
        return [replace(self, query=part) for part in self.query.chunk(num_layers)]

    def in_space(self, space: Space, tokens: slice) -> Tensor:
        """Queries of some tokens in a space: `[kv_heads, group, num_tokens, key_dim]` float32.

        Raises:
            ConfigError: they come rotated, and the space is another.
        """
        query, positions = self.query[:, :, tokens].float(), self.positions[:, tokens]
        if self.rotate is None:
            if space is not Space.ROTATED:
                raise ConfigError("queries come rotated; a policy that compares them before RoPE does not fit")
            return query
        if space is Space.PLAIN:
            return query
        if space is Space.FAR:
            positions = torch.full_like(positions, self.far_position)
        return self.rotate(query.flatten(0, 1)[None], positions[:, None].to(query.device))[0].view_as(query)

    def last_turns(self, spaces: tuple[Space, ...]) -> Tensor | None:
        """What turns the last token's queries to each space, where the model rotates halves of a head against another.

        A turned `q` is `q * turns[space, 0] + q.roll(half) * turns[space, 1]`, bit for bit.

        Returns:
            [num_spaces, 2, key_dim] float32; None where it rotates in another way.

        Raises:
            ConfigError: see `in_space`.
        """
        if spaces not in self.turns:
            self.turns[spaces] = self._last_turns(spaces)
        return self.turns[spaces]

    def _last_turns(self, spaces: tuple[Space, ...]) -> Tensor | None:
        dim = self.query.shape[3]
        first = (torch.arange(dim) < dim // 2).float()
        mixed = torch.randn(dim, generator=torch.Generator().manual_seed(0))
        probes = torch.stack([first, 1 - first, mixed]).to(self.query.device)
        asked = replace(self, query=probes[None, :, None], positions=self.positions[:, -1:])
        found = []
        for space in spaces:
            of_first, of_second, of_mixed = asked.in_space(space, slice(None))[0, :, 0].cpu()
            own, other = of_first.where(first > 0, of_second), of_second.where(first > 0, of_first)
            if dim % 2 or not torch.equal(mixed * own + mixed.roll(dim // 2) * other, of_mixed):
                return None
            found.append(torch.stack([own, other]))
        return torch.stack(found)
