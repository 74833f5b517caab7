# SPDX-License-Identifier: Apache-2.0
"""The Triton twin of `rotate_gather`: one kernel and its launcher."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16


@triton.jit
def _rotate_gather_kernel(
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    row_starts_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_keys_ptr: tl.tensor,
    out_values_ptr: tl.tensor,
    num_slots: tl.tensor,
    block_tokens: tl.tensor,
    num_rows: tl.tensor,
    key_half: tl.tensor,
    value_dim: tl.tensor,
    key_slot_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_row_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_row_stride: tl.tensor,
    cos_row_stride: tl.tensor,
    sin_row_stride: tl.tensor,
    out_key_head_stride: tl.tensor,
    out_key_row_stride: tl.tensor,
    out_value_head_stride: tl.tensor,
    out_value_row_stride: tl.tensor,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE: tl.constexpr,
) -> None:
    # One program: ROWS rows of one block and one head. Moves 2 x rows x (key_dim + value_dim) elements, and reads the
    # rows' cos and sin. A bad table entry moves nothing.
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots_ptr + block).to(tl.int64)
    first = tl.load(row_starts_ptr + block)
    count = tl.load(row_starts_ptr + block + 1) - first
    fits = (slot >= 0) & (slot < num_slots) & (first >= 0) & (count <= block_tokens) & (first + count <= num_rows)
    has_row = ((row < count) & fits)[:, None]
    paged = row.to(tl.int64)[:, None]
    dense = (first + row).to(tl.int64)[:, None]

    lane = tl.arange(0, HALF)[None, :]
    mask = has_row & (lane < key_half)
    source = keys_ptr + slot * key_slot_stride + head * key_head_stride + paged * key_row_stride + lane
    low = tl.load(source, mask=mask, other=0.0)
    high = tl.load(source + key_half, mask=mask, other=0.0)
    cos, sin = cos_ptr + dense * cos_row_stride + lane, sin_ptr + dense * sin_row_stride + lane
    cos_low, cos_high = tl.load(cos, mask=mask, other=0.0), tl.load(cos + key_half, mask=mask, other=0.0)
    sin_low, sin_high = tl.load(sin, mask=mask, other=0.0), tl.load(sin + key_half, mask=mask, other=0.0)
    # Each product is rounded to the keys' dtype before the sum, as torch does it.
    dtype = low.dtype
    low_cos = (low.to(tl.float32) * cos_low.to(tl.float32)).to(dtype).to(tl.float32)
    high_sin = (high.to(tl.float32) * sin_low.to(tl.float32)).to(dtype).to(tl.float32)
    high_cos = (high.to(tl.float32) * cos_high.to(tl.float32)).to(dtype).to(tl.float32)
    low_sin = (low.to(tl.float32) * sin_high.to(tl.float32)).to(dtype).to(tl.float32)
    target = out_keys_ptr + head * out_key_head_stride + dense * out_key_row_stride + lane
    tl.store(target, (low_cos - high_sin).to(dtype), mask=mask)
    tl.store(target + key_half, (high_cos + low_sin).to(dtype), mask=mask)

    lane = tl.arange(0, VALUE)[None, :]
    mask = has_row & (lane < value_dim)
    source = values_ptr + slot * value_slot_stride + head * value_head_stride + paged * value_row_stride + lane
    target = out_values_ptr + head * out_value_head_stride + dense * out_value_row_stride + lane
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)


def rotate_gather(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    row_starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    """See `kvstore.kernels.reference.rotate_gather`; equal to it bit for bit. Runs on the current stream, no sync."""
    num_slots, kv_heads, block_tokens, key_dim = keys.shape
    num_blocks, value_dim = slots.shape[0], values.shape[3]
    if num_blocks == 0:
        return
    kernel: Any = _rotate_gather_kernel[(num_blocks, kv_heads, triton.cdiv(block_tokens, _ROWS))]
    kernel(
        keys,
        values,
        slots,
        row_starts,
        cos,
        sin,
        out_keys,
        out_values,
        num_slots,
        block_tokens,
        out_keys.shape[1],
        key_dim // 2,
        value_dim,
        *keys.stride()[:3],
        *values.stride()[:3],
        cos.stride(0),
        sin.stride(0),
        *out_keys.stride()[:2],
        *out_values.stride()[:2],
        ROWS=_ROWS,
        HALF=triton.next_power_of_2(key_dim // 2),
        VALUE=triton.next_power_of_2(value_dim),
        enable_fp_fusion=False,  # a fused multiply-add rounds once where torch rounds twice
    )
