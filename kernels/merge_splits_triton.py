# SPDX-License-Identifier: Apache-2.0
"""The Triton twin of `merge_parts`, for parts that lie behind each other in memory: one kernel and its launcher."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstore.kernels.parts_reference import Part

_SPLITS = 16


@triton.jit
def _merge_splits_kernel(
    outs_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    num_splits: tl.tensor,
    num_outs: tl.tensor,
    value_dim: tl.tensor,
    SPLITS: tl.constexpr,
    VALUE: tl.constexpr,
) -> None:
    # One program: one query of one head, SPLITS of its parts at a time.
    number = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, VALUE)
    largest = float("-inf")
    weight = 0.0
    mixed = tl.zeros((VALUE,), dtype=tl.float32)
    for begin in range(0, num_splits, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        at = split.to(tl.int64) * num_outs + number
        part_sum = tl.load(sums_ptr + at, mask=split < num_splits, other=float("-inf"))
        larger = tl.maximum(largest, tl.max(part_sum, axis=0))
        level = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.exp(largest - level)
        share = tl.exp(part_sum - level)
        mask = (split < num_splits)[:, None] & (lane < value_dim)[None, :]
        outs = tl.load(outs_ptr + at[:, None] * value_dim + lane[None, :], mask=mask, other=0.0)
        weight = weight * shrink + tl.sum(share, axis=0)
        mixed = mixed * shrink + tl.sum(outs * share[:, None], axis=0)
        largest = larger
    is_blind = weight == 0.0
    mixed = mixed / tl.where(is_blind, 1.0, weight)
    tl.store(out_ptr + number * value_dim + lane, mixed, mask=lane < value_dim)
    total = tl.where(is_blind, float("-inf"), largest + tl.log(tl.where(is_blind, 1.0, weight)))
    tl.store(sum_ptr + number, total)


def merge_splits(outs: Tensor, sums: Tensor) -> Part:
    """Merge attention over splits of the keys; see `kvstore.kernels.parts_reference.merge_parts`. No sync.

    Args:
        outs: [num_splits, batch, num_heads, num_queries, value_dim] float32, contiguous; at least one split.
        sums: [num_splits, batch, num_heads, num_queries] float32, contiguous.

    Returns:
        Those of the whole; see `Part`.
    """
    out, total = torch.empty_like(outs[0]), torch.empty_like(sums[0])
    if total.numel():
        value_dim = outs.shape[-1]
        kernel: Any = _merge_splits_kernel[(total.numel(),)]
        kernel(
            outs,
            sums,
            out,
            total,
            outs.shape[0],
            total.numel(),
            value_dim,
            SPLITS=_SPLITS,
            VALUE=triton.next_power_of_2(value_dim),
        )
    return out, total
