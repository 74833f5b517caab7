# SPDX-License-Identifier: Apache-2.0
"""The Triton twin of `summarise_rows`: one kernel and its launcher."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstore.kernels.paged_reference import Rotation
from kvstore.kernels.summary_reference import check_kind

MAX_ROWS = 256
"""Longest unit, in rows, whose keys a program holds in registers."""

_TILE = 4096


@triton.jit
def _summary_kernel(
    keys_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    angles_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    summaries_ptr: tl.tensor,
    num_units: tl.tensor,
    unit_rows: tl.tensor,
    num_pool_rows: tl.tensor,
    block_tokens: tl.tensor,
    num_angles: tl.tensor,
    half: tl.tensor,
    key_dim: tl.tensor,
    key_slot_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_row_stride: tl.tensor,
    rows_list_stride: tl.tensor,
    angles_list_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    IS_CUBOID: tl.constexpr,
) -> None:
    # One program: one unit, one KV head, PAIRS pairs of elements; a pair turns together. Reads each key once. Behind
    # the pairs that turn, the rest of a key is paired likewise, its first half with its second.
    unit = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    row_in_unit = tl.arange(0, ROWS)
    is_named = row_in_unit < unit_rows
    number = unit.to(tl.int64) * unit_rows + row_in_unit
    row = tl.load(rows_ptr + head * rows_list_stride + number, mask=is_named, other=-1)
    seen = (row >= 0) & (row < num_pool_rows)
    if angles_ptr is not None:
        angle = tl.load(angles_ptr + head * angles_list_stride + number, mask=is_named, other=-1)
        seen = seen & (angle >= 0) & (angle < num_angles)
    slot = (row // block_tokens).to(tl.int64)
    inside = (row % block_tokens).to(tl.int64)
    key_at = keys_ptr + slot * key_slot_stride + head * key_head_stride + inside * key_row_stride

    turns = pair < half
    rest_half = (key_dim - 2 * half + 1) // 2
    first = tl.where(turns, pair, pair + half)
    second = first + tl.where(turns, half, rest_half)
    is_pair = pair < half + rest_half
    has_second = is_pair & (second < key_dim)
    low = tl.load(key_at[:, None] + first[None, :], mask=seen[:, None] & is_pair[None, :], other=0.0).to(tl.float32)
    high = tl.load(key_at[:, None] + second[None, :], mask=seen[:, None] & has_second[None, :], other=0.0)
    high = high.to(tl.float32)
    if angles_ptr is not None:
        turned = seen[:, None] & turns[None, :]
        far = angle.to(tl.int64)[:, None]
        cos = tl.load(cos_ptr + far * cos_stride + pair[None, :], mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + far * sin_stride + pair[None, :], mask=turned, other=0.0).to(tl.float32)
        turned_low = low * cos - high * sin
        high = high * cos + low * sin
        low = turned_low

    count = tl.sum(seen.to(tl.int32), axis=0)
    width = key_dim if IS_MEAN else 2 * key_dim
    out = summaries_ptr + (head * num_units + unit) * width
    if IS_MEAN:
        tl.store(out + first, tl.sum(low, axis=0) / tl.maximum(count, 1), mask=is_pair)
        tl.store(out + second, tl.sum(high, axis=0) / tl.maximum(count, 1), mask=has_second)
    else:
        top, bottom = _sides(low, seen, count, IS_CUBOID)
        tl.store(out + first, top, mask=is_pair)
        tl.store(out + key_dim + first, bottom, mask=is_pair)
        top, bottom = _sides(high, seen, count, IS_CUBOID)
        tl.store(out + second, top, mask=has_second)
        tl.store(out + key_dim + second, bottom, mask=has_second)


@triton.jit
def _sides(keys: tl.tensor, seen: tl.tensor, count: tl.tensor, IS_CUBOID: tl.constexpr) -> tl.tensor:
    # Upper and lower sides of the box, or of the cuboid, around the rows that are seen; 0 where none is.
    top = tl.where(count > 0, tl.max(tl.where(seen[:, None], keys, float("-inf")), axis=0), 0.0)
    bottom = tl.where(count > 0, tl.min(tl.where(seen[:, None], keys, float("inf")), axis=0), 0.0)
    if IS_CUBOID:
        centre = (top + bottom) / 2
        away = tl.where(seen[:, None], tl.abs(keys - centre[None, :]), 0.0)
        spread = tl.sum(away, axis=0) / tl.maximum(count, 1)
        top = centre + spread
        bottom = centre - spread
    return top, bottom


def summarise_rows(keys: Tensor, rows: Tensor, *, rotation: Rotation | None, kind: str) -> Tensor:
    """See `kvstore.kernels.summary_reference.summarise_rows`; equal to it up to the order of sums. No sync.

    Units have at most `MAX_ROWS` rows.
    """
    check_kind(kind)
    num_slots, kv_heads, block_tokens, key_dim = keys.shape
    num_units, unit_rows = rows.shape[1:]
    width = key_dim if kind == "mean" else 2 * key_dim
    summaries = torch.empty(kv_heads, num_units, width, dtype=torch.float32, device=keys.device)
    if summaries.numel() == 0:
        return summaries
    half = rotation.cos.shape[1] if rotation is not None else 0
    cos, sin, angles = (rotation.cos, rotation.sin, rotation.angles) if rotation is not None else (None, None, None)
    row_tile = triton.next_power_of_2(max(unit_rows, 1))
    num_pairs = half + (key_dim - 2 * half + 1) // 2
    pairs = min(triton.next_power_of_2(num_pairs), max(_TILE // row_tile, 16))
    kernel: Any = _summary_kernel[(num_units, kv_heads, triton.cdiv(num_pairs, pairs))]
    kernel(
        keys,
        rows,
        angles,
        cos,
        sin,
        summaries,
        num_units,
        unit_rows,
        num_slots * block_tokens,
        block_tokens,
        cos.shape[0] if cos is not None else 0,
        half,
        key_dim,
        *keys.stride()[:3],
        rows.stride(0) if rows.shape[0] > 1 else 0,
        angles.stride(0) if angles is not None and angles.shape[0] > 1 else 0,
        cos.stride(0) if cos is not None else 0,
        sin.stride(0) if sin is not None else 0,
        ROWS=row_tile,
        PAIRS=pairs,
        IS_MEAN=kind == "mean",
        IS_CUBOID=kind == "cuboid_mean",
    )
    return summaries
