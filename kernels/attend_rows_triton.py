# SPDX-License-Identifier: Apache-2.0
"""The Triton twin of `attend_rows`: one kernel and its launcher; splits of the rows are attended side by side."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstore.kernels.merge_splits_triton import merge_splits
from kvstore.kernels.paged_reference import Rotation
from kvstore.kernels.parts_reference import Part

MAX_DIM = 256
"""Longest key or value whose tiles fit the shared memory of a GPU."""

_LEAST_ROWS = 64  # of a split: fewer cost more to merge than they save
_TILE_NBYTES = 16 << 10
_INTERPRETED_PROGRAMS = 8


@triton.jit
def _attend_rows_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    angles_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    outs_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    rows_per_split: tl.tensor,
    num_pool_rows: tl.tensor,
    block_tokens: tl.tensor,
    num_angles: tl.tensor,
    num_asking: tl.tensor,
    num_queries: tl.tensor,
    group: tl.tensor,
    num_outs: tl.tensor,
    half: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    query_batch_stride: tl.tensor,
    query_head_stride: tl.tensor,
    query_token_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_row_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_row_stride: tl.tensor,
    rows_list_stride: tl.tensor,
    angles_list_stride: tl.tensor,
    bias_list_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    ASKING: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
) -> None:
    # One program: one split of the rows, one KV head, ASKING queries of its group. Reads each row once: index, angle,
    # key and value. The softmax runs along (its largest logit, its sum, the mixed values), all in float32.
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    asking = tl.program_id(2) * ASKING + tl.arange(0, ASKING)
    is_asking = asking < num_asking
    token = asking % num_queries
    query_head = head * group + asking // num_queries % group
    batch = asking // (num_queries * group)
    query_at = query_ptr + (
        batch.to(tl.int64) * query_batch_stride + query_head * query_head_stride + token * query_token_stride
    )

    pair = tl.arange(0, HALF if HALF > 0 else 1)
    is_pair = pair < half
    rest = 2 * half + tl.arange(0, REST if REST > 0 else 1)
    is_rest = rest < key_dim
    if HALF > 0:
        asked = is_asking[:, None] & is_pair[None, :]
        query_low = tl.load(query_at[:, None] + pair[None, :], mask=asked, other=0.0)
        query_high = tl.load(query_at[:, None] + half + pair[None, :], mask=asked, other=0.0)
    if REST > 0:
        asked_rest = is_asking[:, None] & is_rest[None, :]
        query_rest = tl.load(query_at[:, None] + rest[None, :], mask=asked_rest, other=0.0)
    lane = tl.arange(0, VALUE)
    is_lane = lane < value_dim

    largest = tl.full((ASKING,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((ASKING,), dtype=tl.float32)
    mixed = tl.zeros((ASKING, VALUE), dtype=tl.float32)
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, num_rows)
    for begin in range(first, end, ROWS):
        number = begin + tl.arange(0, ROWS)
        row = tl.load(rows_ptr + head * rows_list_stride + number, mask=number < end, other=-1)
        seen = (row >= 0) & (row < num_pool_rows)
        if HALF > 0:
            angle = tl.load(angles_ptr + head * angles_list_stride + number, mask=number < end, other=-1)
            seen = seen & (angle >= 0) & (angle < num_angles)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + head * bias_list_stride + number, mask=number < end, other=float("-inf"))
            seen = seen & (bias > float("-inf"))
        slot = (row // block_tokens).to(tl.int64)
        inside = (row % block_tokens).to(tl.int64)
        key_at = keys_ptr + slot * key_slot_stride + head * key_head_stride + inside * key_row_stride
        logits = tl.zeros((ASKING, ROWS), dtype=tl.float32)
        if HALF > 0:
            met = is_pair[:, None] & seen[None, :]
            low = tl.load(key_at[None, :] + pair[:, None], mask=met, other=0.0)
            high = tl.load(key_at[None, :] + half + pair[:, None], mask=met, other=0.0)
            far = angle.to(tl.int64)[None, :]
            cos = tl.load(cos_ptr + far * cos_stride + pair[:, None], mask=met, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + far * sin_stride + pair[:, None], mask=met, other=0.0).to(tl.float32)
            turned_low = (low.to(tl.float32) * cos - high.to(tl.float32) * sin).to(low.dtype)
            turned_high = (high.to(tl.float32) * cos + low.to(tl.float32) * sin).to(low.dtype)
            logits = tl.dot(query_low, turned_low, logits, input_precision="ieee")
            logits = tl.dot(query_high, turned_high, logits, input_precision="ieee")
        if REST > 0:
            met_rest = is_rest[:, None] & seen[None, :]
            key_rest = tl.load(key_at[None, :] + rest[:, None], mask=met_rest, other=0.0)
            logits = tl.dot(query_rest, key_rest, logits, input_precision="ieee")
        logits = logits * scale
        if bias_ptr is not None:
            logits += bias[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))

        larger = tl.maximum(largest, tl.max(logits, axis=1))
        level = tl.where(larger == float("-inf"), 0.0, larger)  # -inf minus -inf is no number
        shrink = tl.exp(largest - level)
        share = tl.exp(logits - level[:, None])
        weight = weight * shrink + tl.sum(share, axis=1)
        largest = larger
        value = tl.load(
            values_ptr
            + (slot * value_slot_stride + head * value_head_stride + inside * value_row_stride)[:, None]
            + lane[None, :],
            mask=seen[:, None] & is_lane[None, :],
            other=0.0,
        )
        mixed = tl.dot(share.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")

    is_blind = weight == 0.0
    out = (batch.to(tl.int64) * tl.num_programs(1) * group + query_head) * num_queries + token
    out += split.to(tl.int64) * num_outs
    tl.store(
        outs_ptr + out[:, None] * value_dim + lane[None, :],
        mixed / tl.where(is_blind, 1.0, weight)[:, None],
        mask=is_asking[:, None] & is_lane[None, :],
    )
    total = tl.where(is_blind, float("-inf"), largest + tl.log(tl.where(is_blind, 1.0, weight)))
    tl.store(sums_ptr + out, total, mask=is_asking)


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
    """See `kvstore.kernels.paged_reference.attend_rows`; equal to it up to rounding. No sync.

    Weights are rounded to the dtype of `values` before they meet it; dims are at most `MAX_DIM`.

    Source: the splits and their merge are Flash-Decoding's (Dao et al., 2023).
    """
    batch, num_heads, num_queries, key_dim = query.shape
    num_slots, kv_heads, block_tokens, _ = keys.shape
    num_rows, value_dim = rows.shape[1], values.shape[3]
    group, half = num_heads // kv_heads, rotation.cos.shape[1] if rotation is not None else 0
    num_asking, num_outs = batch * group * num_queries, batch * num_heads * num_queries
    # Keys, values and queries of a program share 99 KiB: 64 rows of 256 bytes, 32 of 512, 16 of 1024.
    row_tile = min(max(_TILE_NBYTES // (max(_tile(key_dim), _tile(value_dim)) * keys.element_size()), 16), 64)
    asking = min(max(triton.next_power_of_2(num_asking), 16), row_tile)
    tiles = triton.cdiv(num_asking, asking)
    programs = _programs(keys.device)
    most = min(triton.cdiv(programs, kv_heads * tiles), triton.cdiv(num_rows, _LEAST_ROWS))
    rows_per_split = row_tile * triton.cdiv(triton.cdiv(num_rows, max(most, 1)), row_tile)
    num_splits = max(triton.cdiv(num_rows, max(rows_per_split, 1)), 1)
    outs = query.new_empty(num_splits, batch, num_heads, num_queries, value_dim, dtype=torch.float32)
    sums = query.new_empty(num_splits, batch, num_heads, num_queries, dtype=torch.float32)
    if num_outs == 0:
        return outs[0], sums[0]
    cos, sin, angles = (rotation.cos, rotation.sin, rotation.angles) if rotation is not None else (None, None, None)
    kernel: Any = _attend_rows_kernel[(num_splits, kv_heads, tiles)]
    kernel(
        query,
        keys,
        values,
        rows,
        angles,
        cos,
        sin,
        bias,
        outs,
        sums,
        scale,
        num_rows,
        rows_per_split,
        num_slots * block_tokens,
        block_tokens,
        cos.shape[0] if cos is not None else 0,
        num_asking,
        num_queries,
        group,
        num_outs,
        half,
        key_dim,
        value_dim,
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        _list_stride(rows),
        _list_stride(angles),
        _list_stride(bias),
        cos.stride(0) if cos is not None else 0,
        sin.stride(0) if sin is not None else 0,
        ASKING=asking,
        ROWS=row_tile,
        HALF=_tile(half),
        REST=_tile(key_dim - 2 * half),
        VALUE=_tile(value_dim),
        num_stages=2,
    )
    if num_splits == 1:
        return outs[0], sums[0]
    return merge_splits(outs, sums)


def _tile(dim: int) -> int:
    """Elements of a tile that holds `dim`: a power of two, at least 16 as `tl.dot` wants; 0 for none."""
    return max(triton.next_power_of_2(dim), 16) if dim else 0


def _list_stride(lists: Tensor | None) -> int:
    """From one KV head's list to the next; 0 where all heads have one."""
    return lists.stride(0) if lists is not None and lists.shape[0] > 1 else 0


def _programs(device: torch.device) -> int:
    """Programs that fill a device: two for each of its multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
