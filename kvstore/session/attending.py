# SPDX-License-Identifier: Apache-2.0
"""What a stream and a question have in common: per-layer contexts, placement, rotation, and the mask over them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.kernels.reference import attend, attend_two_parts, received_mass
from kvstore.retrieval.positions import Placement, PositionPolicy, place
from kvstore.session.context import LayerContext
from kvstore.session.residency import Residency
from kvstore.store import Entry

_RECEIVED_QUERIES = 32


class Rotate(Protocol):
    """The model's own rotary function."""

    def __call__(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Rotate `[batch, heads, tokens, dim]` to `positions` `[rows, batch, tokens]` int64; keeps the dtype."""


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What an attention kernel needs for one layer of one forward.

    Args:
        query: [batch, num_heads, num_new, key_dim], rotated.
        keys: [batch, kv_heads, num_keys, key_dim], rotated; past first, then tail, the new tokens last.
        values: [batch, kv_heads, num_keys, value_dim].
        num_past: keys before the tail; every query may see them.
        query_far: the query as the first `num_far` keys meet it; None when `num_far` is 0.
        num_far: keys that are attended at one constant distance.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    num_past: int
    query_far: Tensor | None
    num_far: int

    def mask(self, tail_mask: Tensor | None) -> Tensor | None:
        """Widen a mask over the tail to one over all keys.

        Args:
            tail_mask: [batch, 1, num_new, num_tail] bool, True where a query may look; None means causal.

        Returns:
            [batch or 1, 1, num_new, num_keys] bool, or None when every query sees every key.
        """
        num_new, num_keys = self.query.shape[2], self.keys.shape[2]
        if tail_mask is None:
            if num_new == 1:
                return None
            return _causal_mask(num_new, num_keys, self.query.device)
        if tail_mask.shape[-1] != num_keys - self.num_past:
            raise ShapeError(f"the mask covers {tail_mask.shape[-1]} keys; the tail has {num_keys - self.num_past}")
        if self.num_past == 0:
            return tail_mask
        return torch.nn.functional.pad(tail_mask, (self.num_past, 0), value=True)

    def attend(self, mask: Tensor | None, scale: float) -> Tensor:
        """Attend with the reference kernels: `[batch, num_heads, num_new, value_dim]`."""
        if self.query_far is not None:
            return attend_two_parts(
                self.query_far, self.query, self.keys, self.values, num_far=self.num_far, mask=mask, scale=scale
            )
        return attend(self.query, self.keys, self.values, mask=mask, scale=scale)

    def received(self, num_received: int, num_spare: int, scale: float) -> Tensor:
        """Estimate the attention that the last keys get, among the near ones, from evenly spaced queries.

        Args:
            num_received: keys, counted from the end, to report.
            num_spare: last queries that do not count.
            scale: multiplies the logits.

        Returns:
            [kv_heads, num_received] float32.
        """
        count = self.query.shape[2] - num_spare
        asking = slice(0, count, max(count // _RECEIVED_QUERIES, 1))
        mask = self.mask(None)
        if mask is not None:
            mask = mask[:, :, asking, self.num_far :]
        keys = self.keys[:, :, self.num_far :]  # the far ones are not rotated, and this query is
        return received_mass(self.query[:, :, asking], keys, num_received=num_received, mask=mask, scale=scale)


@functools.lru_cache(maxsize=2)
def _causal_mask(num_new: int, num_keys: int, device: torch.device) -> Tensor:
    """The causal mask of new tokens behind older keys; kept, because every layer of a forward wants the same."""
    ones = torch.ones(num_new, num_keys, dtype=torch.bool, device=device)
    return ones.tril(diagonal=num_keys - num_new)[None, None]


@dataclass(frozen=True, slots=True)
class Past:
    """Blocks to be attended, by role; each list in time order.

    Args:
        far: sinks and retrieved blocks.
        near: the recent window.
    """

    far: tuple[Entry, ...]
    near: tuple[Entry, ...]


class Attending:
    """Per-layer contexts over blocks that lie in the residency.

    Args:
        residency: where the blocks' planes are read.
        rotate: the model's rotary function; None for keys stored after RoPE.
        position: where the past is placed.
        far_position: query position for CONSTANT_FAR.
        rows: rows of a position: 1, or 3 for M-RoPE.
    """

    def __init__(
        self, residency: Residency, rotate: Rotate | None, position: PositionPolicy, far_position: int, rows: int
    ) -> None:
        self._residency = residency
        self._rotate = rotate
        self._position = position
        self._far_position = far_position
        self._rows = rows
        self._next_layer = 0
        num_layers = residency.pool.layout.spec.num_layers
        self.contexts = [LayerContext() for _ in range(num_layers)]
        self._placements: list[Placement] = [Placement(torch.empty(rows, 0, dtype=torch.int64), 0)] * num_layers

    def check(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Refuse a layer out of turn and tensors of another model: a smaller one would be spread over its place.

        Args:
            layer: what `inputs` is to be called with, all of them.
            query: see there.
            keys: see there.
            values: see there.
            positions: see there.

        Raises:
            ShapeError: one of them does not fit.
        """
        spec = self._residency.pool.layout.spec
        if layer not in (0, self._next_layer):
            raise ShapeError(f"layer {layer} out of turn; each forward calls all {spec.num_layers} layers from 0 on")
        batch, num_new = keys.shape[0], keys.shape[2]
        if num_new == 0:
            raise ShapeError("a forward of no tokens; give at least one")
        wanted = [
            (batch, query.shape[1] // spec.kv_heads * spec.kv_heads, num_new, spec.key_dim),
            (batch, spec.kv_heads, num_new, spec.key_dim),
            (batch, spec.kv_heads, num_new, spec.value_dim),
            (self._rows, batch, num_new),
        ]
        had = [tuple(each.shape) for each in (query, keys, values, positions)]
        if had != wanted:
            raise ShapeError(f"layer {layer}: query, keys, values, positions are {had}; the model's are {wanted}")
        self._next_layer = (layer + 1) % spec.num_layers

    def place_past(
        self,
        past: Past,
        positions: dict[int, Tensor],
        open_positions: Sequence[Tensor],
        *,
        num_blocks: int,
        end: int,
        tail_start: int,
    ) -> Placement:
        """Place a past; see `place`.

        Blocks that follow each other in the stream stay as they lie to each other: where M-RoPE grids of neighbours
        overlap, closing them up would move them apart.

        Args:
            past: the blocks.
            positions: [rows, num_tokens] int64 of each block, by index.
            open_positions: the same for rows of blocks that are still open, which follow the near part.
            num_blocks: blocks of the stream: the tail follows the last of them, or the open rows.
            end: position that follows the stream's last token.
            tail_start: position which the engine gives to the first token of the tail.
        """
        far = [positions[entry.index] for entry in past.far]
        near = [*(positions[entry.index] for entry in past.near), *open_positions]
        indices = [entry.index for entry in (*past.far, *past.near)]
        indices += range(num_blocks, num_blocks + len(open_positions))
        segments = _runs(indices, [*far, *near])
        is_consecutive = self._position is PositionPolicy.CONSECUTIVE
        placement = place(
            self._position,
            [] if is_consecutive else far,
            segments if is_consecutive else near,
            rows=self._rows,
            stream_end=end,
            tail_start=tail_start,
            far_position=self._far_position,
        )
        if is_consecutive and indices and indices[-1] == max(num_blocks + len(open_positions), 1) - 1:
            shift = int(placement.past[0, -1] - segments[-1][0, -1])  # the tail follows its neighbour, likewise
            placement = replace(placement, offset=shift + end - tail_start)
        return placement

    def set_past(
        self, layer: int, past: Past, open_planes: Sequence[tuple[Tensor, Tensor]], placement: Placement
    ) -> None:
        """Assemble one layer's past and rotate it to its place.

        Args:
            layer: layer index.
            past: blocks that are resident for this layer.
            open_planes: (keys, values) `[kv_heads, count, dim]` of rows of open blocks, which follow the near part.
            placement: from `place_past` over the same blocks.
        """
        entries = [*past.far, *past.near]
        spec = self._residency.pool.layout.spec
        keys = [self._residency.keys(entry.key, layer, entry.num_tokens) for entry in entries]
        values = [self._residency.values(entry.key, layer, entry.num_tokens) for entry in entries]
        keys += [plane for plane, _ in open_planes]
        values += [plane for _, plane in open_planes]
        self._placements[layer] = placement
        if not keys:
            device, slot = self._residency.pool.device, self._residency.pool
            dtype = slot.layout.keys(slot.slot(0)).dtype
            empty_keys = torch.empty(1, spec.kv_heads, 0, spec.key_dim, dtype=dtype, device=device)
            empty_values = torch.empty(1, spec.kv_heads, 0, spec.value_dim, dtype=dtype, device=device)
            self.contexts[layer].set_past(empty_keys, empty_values)
            return
        joined = torch.cat(keys, dim=1)[None]
        near = self._rotated(joined[:, :, placement.num_far :], placement.past[:, None, placement.num_far :])
        joined = torch.cat([joined[:, :, : placement.num_far], near], dim=2) if placement.num_far else near
        self.contexts[layer].set_past(joined, torch.cat(values, dim=1)[None])

    def inputs(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> AttentionInputs:
        """Append new tokens to one layer's tail and return what its attention kernel needs.

        Args:
            layer: layer index.
            query: [batch, num_heads, num_new, key_dim], before RoPE (after it when keys are stored so).
            keys: [batch, kv_heads, num_new, key_dim], likewise.
            values: [batch, kv_heads, num_new, value_dim].
            positions: [rows, batch, num_new] int64, as the engine counts them.
        """
        context, placement = self.contexts[layer], self._placements[layer]
        moved = positions + placement.offset
        all_keys, all_values = context.append(self._rotated(keys, moved), values)
        query_far = None
        if placement.num_far:
            query_far = self._rotated(query, torch.full_like(positions, placement.far_position))
        return AttentionInputs(
            self._rotated(query, moved), all_keys, all_values, context.num_past, query_far, placement.num_far
        )

    def _rotated(self, vectors: Tensor, positions: Tensor) -> Tensor:
        if self._rotate is None or vectors.shape[2] == 0:
            return vectors
        return self._rotate(vectors, positions.to(vectors.device))


def _runs(indices: Sequence[int], segments: Sequence[Tensor]) -> list[Tensor]:
    """Join the positions of blocks that follow each other in the stream."""
    runs: list[list[Tensor]] = []
    for number, segment in enumerate(segments):
        if number > 0 and indices[number] == indices[number - 1] + 1:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return [torch.cat(run, dim=1) for run in runs]
