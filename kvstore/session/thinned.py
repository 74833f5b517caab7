# SPDX-License-Identifier: Apache-2.0
"""Thins a run of blocks in their slots: asks the filter which tokens stay, and moves them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.retrieval.retention.thinning import Thinning
from kvstore.retrieval.tokens import LayerTokens, Rotate
from kvstore.tiers.device.pool import DevicePool


@dataclass(frozen=True, slots=True)
class SlotTokens:
    """The tokens of a block that lies in a slot.

    Args:
        slot_idx: which slot.
        positions: [rows, num_tokens] int64.
        received: [num_layers, kv_heads, num_tokens] float32 attention mass, on any device.
        group: its frame group, -1 for text.
    """

    slot_idx: int
    positions: Tensor
    received: Tensor
    group: int

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return self.positions.shape[1]


def thin(
    pool: DevicePool, thinning: Thinning, run: Sequence[SlotTokens], first_token: int, rotate: Rotate | None
) -> list[Tensor]:
    """Thin blocks that follow each other; their slots then hold what stays in their first rows, in all layers.

    The filter sees the keys of the first layer, which are nearest to the model's input, and the attention that was
    received in all layers together.

    Args:
        pool: the slots.
        thinning: says what stays.
        run: the blocks.
        first_token: number of the first token in the stream.
        rotate: the model's rotary function; None where keys are stored rotated.

    Returns:
        For each block the places of the tokens that stay: `[num_kept]` int64, ascending, at least one.
    """
    tokens = LayerTokens(
        first_token,
        torch.cat([pool.keys(block.slot_idx)[0, :, : block.num_tokens] for block in run], dim=1).cpu(),
        torch.cat([pool.values(block.slot_idx)[0, :, : block.num_tokens] for block in run], dim=1).cpu(),
        torch.cat([block.positions for block in run], dim=1),
        torch.cat([block.received.sum(dim=0) for block in run], dim=1).cpu(),
        torch.cat([torch.full((block.num_tokens,), block.group) for block in run]),
        rotate,
    )
    kept = thinning.kept(tokens, [block.num_tokens for block in run])
    for block, places in zip(run, kept, strict=True):
        for planes in (pool.keys(block.slot_idx), pool.values(block.slot_idx)):
            planes[:, :, : places.shape[0]] = planes[:, :, places.to(planes.device)]
    return kept
