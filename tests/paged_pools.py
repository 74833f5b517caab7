# SPDX-License-Identifier: Apache-2.0
"""Pools, tables and queries of any geometry, for tests of what reads rows where they lie."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvstore.kernels.paged_reference import Rotation

BLOCK_TOKENS, NUM_SLOTS = 7, 9


@dataclass(frozen=True)
class Geometry:
    """What a case is made of; `half` 0 leaves keys as they lie."""

    kv_heads: int = 2
    group: int = 2
    key_dim: int = 64
    value_dim: int = 32
    half: int = 32
    num_rows: int = 40
    num_lists: int = 2
    num_queries: int = 1
    batch: int = 1
    has_bias: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    kv_heads = draw(st.integers(1, 3))
    key_dim = draw(st.sampled_from([32, 33, 48, 80, 128, 192, 256]))
    return Geometry(
        kv_heads=kv_heads,
        group=draw(st.sampled_from([1, 2, 3, 7, 16])),
        key_dim=key_dim,
        value_dim=draw(st.sampled_from([32, 40, 128])),
        half=draw(st.sampled_from([0, 8, key_dim // 2])),
        num_rows=draw(st.sampled_from([0, 1, 31, 64, 65, 150])),
        num_lists=draw(st.sampled_from([1, kv_heads])),
        num_queries=draw(st.sampled_from([1, 2, 5, 16])),
        batch=draw(st.sampled_from([1, 1, 2])),
        has_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@dataclass(frozen=True)
class Case:
    """The arguments of `attend_rows`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor
    rotation: Rotation | None
    bias: Tensor | None
    scale: float

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same values in another dtype, on another device; lists stay what they are."""
        rotation = self.rotation
        if rotation is not None:
            rotation = Rotation(rotation.cos.to(device), rotation.sin.to(device), rotation.angles.to(device))
        query, keys, values = (each.to(device, dtype) for each in (self.query, self.keys, self.values))
        bias = None if self.bias is None else self.bias.to(device)
        return Case(query, keys, values, self.rows.to(device), rotation, bias, self.scale)

    def of_rows(self, part: slice) -> Case:
        """The same of some of the rows."""
        rotation = self.rotation and replace(self.rotation, angles=self.rotation.angles[:, part])
        bias = None if self.bias is None else self.bias[:, part]
        return replace(self, rows=self.rows[:, part], rotation=rotation, bias=bias)


def make_case(geometry: Geometry) -> Case:
    """Rows in any order, some of them none and some named twice, of the second layer of a pool; angles of M-RoPE."""
    chance = torch.Generator().manual_seed(geometry.seed)
    heads, lists, rows = geometry.kv_heads, geometry.num_lists, geometry.num_rows

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance)

    def pool(dim: int) -> Tensor:
        return random(NUM_SLOTS, 3, heads, BLOCK_TOKENS, dim).to(geometry.dtype)[:, 1]

    named = torch.randint(-BLOCK_TOKENS, NUM_SLOTS * BLOCK_TOKENS, (lists, rows), generator=chance).int()
    rotation = None
    if geometry.half:
        # Three rows of positions of far-away tokens, of which an element takes one, as its section says.
        positions = torch.randint(0, 100_000, (3, 50), generator=chance)
        section = torch.arange(geometry.half) % 3
        angle = positions[section].T * 10_000.0 ** -(torch.arange(geometry.half) / geometry.half)
        angles = torch.randint(0, 50, (lists, rows), generator=chance).int()
        cos, sin = (part.to(geometry.dtype).contiguous() for part in (angle.cos(), angle.sin()))
        rotation = Rotation(cos, sin, angles)
    bias = None
    if geometry.has_bias:
        bias = random(lists, rows).masked_fill(random(lists, rows) > 1, float("-inf"))
    query = random(geometry.batch, heads * geometry.group, geometry.num_queries, geometry.key_dim).to(geometry.dtype)
    return Case(query, pool(geometry.key_dim), pool(geometry.value_dim), named, rotation, bias, geometry.key_dim**-0.5)
