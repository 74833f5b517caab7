# SPDX-License-Identifier: Apache-2.0
"""What a stream and a question have in common: per-layer contexts, placement, rotation, and the mask over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.retrieval.estimates import Estimate
from kvstore.retrieval.positions import Placement, PositionPolicy, place
from kvstore.retrieval.tokens import Rotate
from kvstore.session.attention_inputs import AttentionInputs, ContextRule
from kvstore.session.context import LayerContext
from kvstore.session.reading.differences import Differences
from kvstore.session.reading.past import PastTokens
from kvstore.session.residency import Residency

_JOINED = frozenset(
    {PositionPolicy.CONSECUTIVE, PositionPolicy.SLOT_INDEX, PositionPolicy.SHRINK, PositionPolicy.GROUP}
)


@dataclass(frozen=True, slots=True)
class PlacedPast:
    """Where the rows of a past are placed, list by list.

    Args:
        positions: [position rows, num_lists, num_rows] int64.
        offset: added to the new tokens' own positions.
        num_far: the first rows, attended un-rotated by queries at one distance; 0 for none.
        bias: [num_lists, num_rows] float32, -inf for rows that no token is in; None for zeros.
        context: rows with a rule of their own.
    """

    positions: Tensor
    offset: int
    num_far: int
    bias: Tensor | None
    context: ContextRule | None = None


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
        self._placed = [PlacedPast(torch.empty(rows, 1, 0, dtype=torch.int64), 0, 0, None)] * num_layers

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
        self, past: PastTokens, open_positions: Sequence[Tensor], *, num_stored: int, end: int, tail_start: int
    ) -> PlacedPast:
        """Place a past and the rows of open blocks behind it; see `place`.

        Tokens that follow each other in the stream stay as they lie to each other: where M-RoPE grids of neighbours
        overlap, closing them up would move them apart. KV heads may read different tokens; all end at one place, so
        that the new tokens follow at once.

        Args:
            past: the tokens.
            open_positions: [rows, count] int64 of rows of blocks that are still open, which follow the near part.
            num_stored: tokens of the stream in blocks: the open rows follow them, or else the tail.
            end: position that follows the stream's last token.
            tail_start: position which the engine gives to the first token of the tail.
        """
        opened = torch.cat([torch.empty(self._rows, 0, dtype=torch.int64), *open_positions], dim=1)
        if self._position is PositionPolicy.ORIGINAL:
            bias = self._bias(past.numbers >= 0, opened.shape[1])
            behind = opened[:, None].expand(-1, past.numbers.shape[0], -1)
            return PlacedPast(torch.cat([past.positions, behind], dim=2), end - tail_start, 0, bias)
        lists = []
        for numbers, positions in zip(past.numbers, past.positions.unbind(1), strict=True):
            far, near = numbers[: past.num_far] >= 0, numbers[past.num_far :]
            tokens = torch.cat([numbers[: past.num_far][far], near, num_stored + torch.arange(opened.shape[1])])
            where = torch.cat([positions[:, : past.num_far][:, far], positions[:, past.num_far :], opened], dim=1)
            lists.append(self._place_list(tokens, where, int(far.sum()), num_stored + opened.shape[1], end, tail_start))
        offset = max(placement.offset for placement in lists)
        num_rows = past.numbers.shape[1] + opened.shape[1]
        placed = torch.zeros(self._rows, len(lists), num_rows, dtype=torch.int64)
        present = torch.nn.functional.pad(past.numbers >= 0, (0, opened.shape[1]), value=True)
        for number, placement in enumerate(lists):
            placed[:, number, present[number]] = placement.past + (offset - placement.offset)
        num_far = past.num_far if any(placement.num_far for placement in lists) else 0
        return PlacedPast(placed, offset, num_far, self._bias(past.numbers >= 0, opened.shape[1]))

    def _bias(self, present: Tensor, num_open: int) -> Tensor | None:
        """What hides rows that no token is in, `[num_lists, num_rows + num_open]`; None where there are none."""
        if bool(present.all()):
            return None
        hidden = torch.zeros(present.shape).masked_fill_(~present, float("-inf"))
        return torch.nn.functional.pad(hidden, (0, num_open)).to(self._residency.pool.device)

    def _place_list(
        self, tokens: Tensor, positions: Tensor, num_far: int, num_tokens: int, end: int, tail_start: int
    ) -> Placement:
        """Place one list of tokens, of which the last ones may be the stream's end."""
        if self._position in _JOINED:  # a window that follows what was retrieved goes on with it
            far, near = [], _runs(tokens, positions)
        else:
            far, near = (_runs(tokens[part], positions[:, part]) for part in (slice(num_far), slice(num_far, None)))
        placement = place(
            self._position,
            far,
            near,
            rows=self._rows,
            stream_end=end,
            tail_start=tail_start,
            far_position=self._far_position,
        )
        if self._position is PositionPolicy.CONSECUTIVE and tokens.shape[0] and int(tokens[-1]) == num_tokens - 1:
            shift = int(placement.past[0, -1] - positions[0, -1])  # the tail follows its neighbour, likewise
            placement = replace(placement, offset=shift + end - tail_start)
        return placement

    def set_past(
        self,
        layer: int,
        past: PastTokens,
        open_planes: Sequence[tuple[Tensor, Tensor]],
        placed: PlacedPast,
        estimate: Estimate | None = None,
    ) -> None:
        """Make one layer's past of rows that were read, rotated to their places.

        Args:
            layer: layer index.
            past: rows of this layer.
            open_planes: (keys, values) `[kv_heads, count, dim]` of rows of open blocks, which follow the near part.
            placed: from `place_past` over the same rows.
            estimate: units whose attention is estimated: each is met as one more token, of their mean key and mean
                value, that counts as many times as the unit has tokens.
        """
        keys, values = past.keys[layer], past.values[layer]
        if open_planes:
            keys = torch.cat([keys, *(plane for plane, _ in open_planes)], dim=1)
            values = torch.cat([values, *(plane for _, plane in open_planes)], dim=1)
        if self.contexts[layer].num_tail:  # it is rotated already: what moves is the past, since only distances count
            held = self._placed[layer].offset
            placed = replace(placed, positions=placed.positions + (held - placed.offset), offset=held)
        self._placed[layer] = placed
        far, near = keys[:, : placed.num_far], placed.positions[:, :, placed.num_far :]
        if near.shape[1] == 1:
            moved = self._rotated(keys[None, :, placed.num_far :], near)[0]
        else:  # each KV head reads tokens of its own
            moved = self._rotated(keys[:, None, placed.num_far :], near)[:, 0]
        joined = torch.cat([far, moved], dim=1) if placed.num_far else moved
        if estimate is not None:
            means = estimate.value_sums / estimate.counts.clamp_min(1)[:, :, None]
            joined = torch.cat([joined, estimate.centroids.to(joined)], dim=1)
            values = torch.cat([values, means.to(values)], dim=1)
            bias = joined.new_zeros(1, moved.shape[1], dtype=torch.float32) if placed.bias is None else placed.bias
            bias = torch.cat([bias.expand(joined.shape[0], -1), estimate.counts.log().to(bias.device)], dim=1)
            self._placed[layer] = replace(placed, bias=bias)
        self.contexts[layer].set_past(joined[None], values[None])

    def rotated_rows(self, differences: Differences) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Make rows that take the place of others ready for `LayerContext.replace`, layer by layer.

        Their order in a past says nothing where positions are the original ones.
        """
        keys = self._rotated(differences.keys[None, None], differences.positions[:, None])[0, 0]
        heads, rows = differences.heads.to(keys.device), differences.rows.to(keys.device)
        parts = (each.split(differences.counts) for each in (heads, rows, keys, differences.values))
        return list(zip(*parts, strict=True))

    def inputs(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> AttentionInputs:
        """Append new tokens to one layer's tail and return what its attention kernel needs.

        Args:
            layer: layer index.
            query: [batch, num_heads, num_new, key_dim], before RoPE (after it when keys are stored so).
            keys: [batch, kv_heads, num_new, key_dim], likewise.
            values: [batch, kv_heads, num_new, value_dim].
            positions: [rows, batch, num_new] int64, as the engine counts them.
        """
        context, placed = self.contexts[layer], self._placed[layer]
        both = self._rotated(torch.cat([query, keys], dim=1), positions + placed.offset)
        moved_query, moved_keys = both.split([query.shape[1], keys.shape[1]], dim=1)
        all_keys, all_values = context.append(moved_keys, values)
        query_far = None
        if placed.num_far:
            query_far = self._rotated(query, torch.full_like(positions, self._far_position))
        return AttentionInputs(
            moved_query,
            all_keys,
            all_values,
            context.num_past,
            query_far,
            placed.num_far,
            placed.bias,
            placed.context,
        )

    def _rotated(self, vectors: Tensor, positions: Tensor) -> Tensor:
        if self._rotate is None or vectors.shape[2] == 0:
            return vectors
        return self._rotate(vectors, positions.to(vectors.device))


def _runs(tokens: Tensor, positions: Tensor) -> list[Tensor]:
    """Cut positions `[rows, num_tokens]` where the next token is not the next one of the stream."""
    gaps = (tokens.diff() != 1).nonzero()[:, 0] + 1
    return [run for run in positions.tensor_split(gaps.tolist(), dim=1) if run.shape[1]]
