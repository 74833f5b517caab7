# SPDX-License-Identifier: Apache-2.0
"""Attention to rows that lie in a pool's slots, met in place; in plain torch, as the specification of its twin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.kernels.parts_reference import Part, attend_part


@dataclass(frozen=True, slots=True)
class Rotation:
    """At which angles keys are met. Any rule of positions fits, as the rows of the table may be anything.

    One row per position serves ordinary RoPE, `angles` being the positions; under M-RoPE, or where positions are
    fractions, a row per token does, the model's own rotary function giving the cosines.

    Args:
        cos: [num_angles, half] of any floating dtype, elements of a row adjacent; element i turns elements i and
            i + half of a key (NeoX halves). Behind the first 2 * half a key is left as it is: half may be below
            key_dim / 2.
        sin: the same.
        angles: the table's row for each row that is met, in the shape of its `rows`, int32, adjacent in a list.
    """

    cos: Tensor
    sin: Tensor
    angles: Tensor


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    *,
    rotation: Rotation | None,
    bias: Tensor | None,
    scale: float,
) -> Part:
    """Attend to rows of a pool where they lie; every query sees every row.

    A row that does not exist, whose angle does not, or whose bias is -inf, is not seen, whatever its place holds.

    Args:
        query: [batch, num_heads, num_queries, key_dim], rotated, dtype of `keys`; all sequences meet the same rows.
        keys: [num_slots, kv_heads, block_tokens, key_dim], one layer of every slot, elements of a row adjacent;
            num_heads is a multiple of kv_heads.
        values: [num_slots, kv_heads, block_tokens, value_dim], likewise.
        rows: [1 or kv_heads, num_rows] int32: `slot * block_tokens + row inside the slot`, for all KV heads or for
            each; negative where a list is shorter than others; adjacent in a list. num_rows may be 0.
        rotation: how keys are turned on the way, in float32, then rounded to their dtype; None if they lie rotated.
        bias: [1 or kv_heads, num_rows] float32, added to the logits: padding, or the log of how many tokens a row
            counts for.
        scale: multiplies the products.

    Returns:
        Output and log-sum-exp, to be merged with those of other parts; see `Part`.

    Source: paged attention (arXiv:2309.06180) with keys that are stored before RoPE.
    """
    seen = rows_seen(keys, rows, rotation, bias)
    weights = torch.zeros(seen.shape, device=keys.device) if bias is None else bias.expand(seen.shape)
    weights = weights.masked_fill(~seen, float("-inf"))
    met = gather_rows(keys, rows, seen, rotation).to(keys.dtype)
    return attend_part(
        query, met[None], gather_rows(values, rows, seen, None)[None], mask=weights[None, :, None], scale=scale
    )


def page_rows(first_rows: Tensor, counts: Tensor, page_tokens: int) -> Tensor:
    """Name the rows of pages, each a run inside one slot.

    Args:
        first_rows: [num_lists, num_pages] int32: where each starts, as in `rows` of `attend_rows`; negative for none.
        counts: [num_lists, num_pages] int32: rows of each, at most page_tokens.
        page_tokens: rows of the longest.

    Returns:
        [num_lists, num_pages, page_tokens] int32, -1 behind the last row of a page; flatten it to attend to it.
    """
    inside = torch.arange(page_tokens, dtype=torch.int32, device=first_rows.device)
    rows = first_rows[:, :, None] + inside
    return rows.masked_fill((inside >= counts[:, :, None]) | (first_rows[:, :, None] < 0), -1)


def rows_seen(keys: Tensor, rows: Tensor, rotation: Rotation | None, bias: Tensor | None) -> Tensor:
    """Say which rows exist and may be seen; arguments as in `attend_rows`.

    Returns:
        [num_lists, ...] bool, in the shape of `rows`, or of as many lists as angles or biases have.
    """
    seen = (rows >= 0) & (rows < keys.shape[0] * keys.shape[2])
    if rotation is not None:
        seen = seen & (rotation.angles >= 0) & (rotation.angles < rotation.cos.shape[0])
    return seen if bias is None else seen & ~bias.isneginf()


def gather_rows(plane: Tensor, rows: Tensor, seen: Tensor, rotation: Rotation | None) -> Tensor:
    """Copy rows out of a plane of the pool, and turn them.

    Args:
        plane: [num_slots, kv_heads, block_tokens, dim].
        rows: [1 or kv_heads, ...] int32, as in `attend_rows`.
        seen: [1 or kv_heads, ...] bool, from `rows_seen`; others become 0.
        rotation: as in `attend_rows`.

    Returns:
        [kv_heads, ..., dim]; float32 if turned, else dtype of `plane`.
    """
    at = rows.masked_fill(rows.lt(0) | rows.ge(plane.shape[0] * plane.shape[2]), 0).long()
    heads = torch.arange(plane.shape[1], device=plane.device).view(-1, *[1] * (rows.dim() - 1))
    found = plane[at // plane.shape[2], heads, at % plane.shape[2]].masked_fill_(~seen[..., None], 0)
    if rotation is None:
        return found
    half = rotation.cos.shape[1]
    angle = rotation.angles.clamp(0, rotation.cos.shape[0] - 1).long()
    cos, sin = rotation.cos[angle].float(), rotation.sin[angle].float()
    low, high, rest = found.float().tensor_split([half, 2 * half], dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)
