# SPDX-License-Identifier: Apache-2.0
"""One layer's keys and values in the slots of a pool, made up, and the ways to attend to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.kernels.dispatch import attend_rows
from kvstore.kernels.paged_reference import Rotation, gather_rows, page_rows
from shapes.models import Shape

BLOCK_TOKENS = 128
_TILE_BLOCKS = 64
"""Distinct blocks; what they hold does not change how long reading them takes."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Keys before RoPE and values of a context, block by block, in slots in no order.

    Args:
        shape: the model.
        keys: [num_slots, kv_heads, BLOCK_TOKENS, dim] bfloat16.
        values: likewise.
        slots: [num_blocks] int32: where each block of the context lies.
        cos: [num_tokens, dim / 2] bfloat16: its angles.
        sin: likewise.
    """

    shape: Shape
    keys: Tensor
    values: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor

    @staticmethod
    def made(
        shape: Shape, num_tokens: int, table: tuple[Tensor, Tensor], device: torch.device, chance: torch.Generator
    ) -> Layer:
        """Make a layer; `table` holds the cosines and sines of `shape.angles(num_tokens)`, shared by all layers."""
        num_blocks = num_tokens // BLOCK_TOKENS
        planes = []
        for _ in range(2):
            tile = torch.randn(_TILE_BLOCKS, shape.kv_heads, BLOCK_TOKENS, shape.dim, generator=chance).bfloat16()
            repeats = -(-num_blocks // _TILE_BLOCKS)
            planes.append(tile.to(device).repeat(repeats, 1, 1, 1)[:num_blocks].contiguous())
        order = torch.randperm(num_blocks, generator=chance).int().to(device)
        return Layer(shape, planes[0], planes[1], order, *table)

    @property
    def row_nbytes(self) -> int:
        """Bytes of a token's key and value in one KV head."""
        return 2 * self.shape.dim * self.keys.itemsize

    @property
    def num_tokens(self) -> int:
        """Tokens of the context."""
        return self.slots.shape[0] * BLOCK_TOKENS

    def rows_of(self, pages: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
        """Rows and angles of pages: both [num_lists, num_pages * page_tokens] int32.

        Args:
            pages: [num_lists, num_pages] int64.
            page_tokens: tokens of a page; divides a block.
        """
        first = pages * page_tokens
        starts = self.slots[first // BLOCK_TOKENS] * BLOCK_TOKENS + (first % BLOCK_TOKENS).int()
        counts = torch.full_like(starts, page_tokens)
        rows, angles = (page_rows(each, counts, page_tokens).flatten(1) for each in (starts, first.int()))
        return rows, angles

    def attend(self, query: Tensor, rows: Tensor, angles: Tensor) -> Tensor:
        """Attend to rows where they lie: [1, num_heads, 1, dim] float32; `query` likewise, bfloat16, rotated."""
        rotation = Rotation(self.cos, self.sin, angles)
        scale = self.shape.dim**-0.5
        return attend_rows(query, self.keys, self.values, rows, rotation=rotation, bias=None, scale=scale)[0]

    def gather_and_attend(self, query: Tensor, rows: Tensor, angles: Tensor) -> Tensor:
        """The same by a copy of the rows that sdpa attends to."""
        seen = torch.ones_like(rows, dtype=torch.bool)
        keys = gather_rows(self.keys, rows, seen, Rotation(self.cos, self.sin, angles)).to(query.dtype)
        return attend_to_all(query, keys[None], gather_rows(self.values, rows, seen, None)[None])

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values as an engine's own cache holds them: [1, kv_heads, num_tokens, dim] bfloat16."""
        keys = self.keys.new_empty(1, self.shape.kv_heads, self.num_tokens, self.shape.dim)
        values = torch.empty_like(keys)
        for number in range(self.slots.shape[0]):  # block by block: a float32 copy of all would not fit
            tokens = slice(number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
            slot = int(self.slots[number])
            low, high = self.keys[slot].float().chunk(2, dim=-1)
            cos, sin = self.cos[tokens].float(), self.sin[tokens].float()
            keys[0, :, tokens] = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(keys.dtype)
            values[0, :, tokens] = self.values[slot]
        return keys, values


def attend_to_all(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Torch's sdpa over keys that lie rotated in one piece: of one token, a KV head's query heads are its queries."""
    grouped = query.unflatten(1, (keys.shape[1], -1))[:, :, :, 0]
    return torch.nn.functional.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2)[:, :, None]
