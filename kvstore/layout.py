# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of slots: where plane, head, token and element lie in a slot's bytes. Views only, nothing is moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.spec import ModelSpec

ALIGNMENT = 4096
"""Slots and extents are multiples of this many bytes, as O_DIRECT wants."""

TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def round_up(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Smallest multiple of `alignment` that is not below `nbytes`."""
    return -(-nbytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Byte layout of one slot: layers outermost, then the K plane and the V plane.

    A plane is `[kv_heads, block_tokens, dim]`, contiguous. A block of fewer tokens fills the first rows of each head.

    Args:
        spec: the model's KV geometry.
        block_tokens: tokens that a slot has room for.
    """

    spec: ModelSpec
    block_tokens: int

    def __post_init__(self) -> None:
        if type(self.block_tokens) is not int or not 1 <= self.block_tokens <= 65535:
            raise ConfigError(f"block_tokens is {self.block_tokens!r}; it must be an integer from 1 to 65535")

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a slot, rounded up to `ALIGNMENT`."""
        return round_up(self.block_tokens * self.spec.token_nbytes)

    def keys(self, slot: Tensor) -> Tensor:
        """View a slot's keys: `[num_layers, kv_heads, block_tokens, key_dim]`, strided, shares memory.

        Args:
            slot: [slot_nbytes] uint8, contiguous, any device; or [num_slots, slot_nbytes], which puts `num_slots` first
                in the result.

        Raises:
            ShapeError: not such a tensor.
        """
        return self._view(slot, self.spec.key_dim, offset=0)

    def values(self, slot: Tensor) -> Tensor:
        """View a slot's values: `[num_layers, kv_heads, block_tokens, value_dim]`; see `keys`."""
        return self._view(slot, self.spec.value_dim, offset=self._plane(self.spec.key_dim))

    def _plane(self, dim: int) -> int:
        return self.spec.kv_heads * self.block_tokens * dim

    def _view(self, slot: Tensor, dim: int, *, offset: int) -> Tensor:
        is_slots = slot.dim() in (1, 2) and slot.shape[-1] == self.slot_nbytes
        if slot.dtype != torch.uint8 or not is_slots or not slot.is_contiguous():
            raise ShapeError(f"a slot is [{self.slot_nbytes}] uint8, contiguous; got {list(slot.shape)} {slot.dtype}")
        typed = slot.view(TORCH_DTYPE[self.spec.dtype])
        per_layer = self._plane(self.spec.key_dim) + self._plane(self.spec.value_dim)
        return typed.as_strided(
            (*typed.shape[:-1], self.spec.num_layers, self.spec.kv_heads, self.block_tokens, dim),
            (*typed.stride()[:-1], per_layer, self.block_tokens * dim, dim, 1),
            typed.storage_offset() + offset,
        )
