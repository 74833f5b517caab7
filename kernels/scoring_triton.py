# SPDX-License-Identifier: Apache-2.0
"""The Triton twin of `score_units`: products, and shares where a group wants them."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstore.kernels.scoring_reference import Agreement, check_scoring

_UNITS = 64
_WIDTH = 64


@triton.jit
def _sum_kernel(
    lifted_ptr: tl.tensor,
    summaries_ptr: tl.tensor,
    eligible_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    num_units: tl.tensor,
    width: tl.tensor,
    num_together: tl.tensor,
    lifted_stride: tl.tensor,
    summary_partition_stride: tl.tensor,
    summary_unit_stride: tl.tensor,
    eligible_stride: tl.tensor,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    # One program: UNITS units of the partitions that select together. Reads their summaries once.
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    is_unit = unit < num_units
    together = tl.program_id(1).to(tl.int64)
    scores = tl.zeros((UNITS,), dtype=tl.float32)
    for member in range(num_together):
        partition = together * num_together + member
        at = summaries_ptr + partition * summary_partition_stride + unit.to(tl.int64) * summary_unit_stride
        for part in range(0, width, WIDTH):
            lane = part + tl.arange(0, WIDTH)
            is_lane = lane < width
            asking = tl.load(lifted_ptr + partition * lifted_stride + lane, mask=is_lane, other=0.0).to(tl.float32)
            summary = tl.load(at[:, None] + lane[None, :], mask=is_unit[:, None] & is_lane[None, :], other=0.0)
            scores += tl.sum(summary.to(tl.float32) * asking[None, :], axis=1)
    if eligible_ptr is not None:
        eligible = tl.load(eligible_ptr + together * eligible_stride + unit, mask=is_unit, other=0)
        scores = tl.where(eligible != 0, scores, float("-inf"))
    tl.store(scores_ptr + together * num_units + unit, scores, mask=is_unit)


@triton.jit
def _logits_kernel(
    lifted_ptr: tl.tensor,
    summaries_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    scale: tl.tensor,
    num_units: tl.tensor,
    num_asking: tl.tensor,
    width: tl.tensor,
    lifted_partition_stride: tl.tensor,
    lifted_asking_stride: tl.tensor,
    summary_partition_stride: tl.tensor,
    summary_unit_stride: tl.tensor,
    ASKING: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    # One program: UNITS units of one partition, ASKING of those that ask. Writes logits and their log-sum-exp here.
    tile = tl.program_id(0)
    unit = tile * UNITS + tl.arange(0, UNITS)
    is_unit = unit < num_units
    partition = tl.program_id(1).to(tl.int64)
    asking = tl.program_id(2) * ASKING + tl.arange(0, ASKING)
    is_asking = asking < num_asking
    left_at = lifted_ptr + partition * lifted_partition_stride + asking.to(tl.int64) * lifted_asking_stride
    right_at = summaries_ptr + partition * summary_partition_stride + unit.to(tl.int64) * summary_unit_stride
    logits = tl.zeros((ASKING, UNITS), dtype=tl.float32)
    for part in range(0, width, WIDTH):
        lane = part + tl.arange(0, WIDTH)
        is_lane = lane < width
        left = tl.load(left_at[:, None] + lane[None, :], mask=is_asking[:, None] & is_lane[None, :], other=0.0)
        right = tl.load(right_at[None, :] + lane[:, None], mask=is_unit[None, :] & is_lane[:, None], other=0.0)
        logits = tl.dot(left, right, logits, input_precision="ieee")
    logits = tl.where(is_unit[None, :], logits * scale, float("-inf"))
    largest = tl.max(logits, axis=1)  # finite: a tile has a unit
    total = largest + tl.log(tl.sum(tl.exp(logits - largest[:, None]), axis=1))
    row = partition * num_asking + asking
    tl.store(logits_ptr + row[:, None] * num_units + unit[None, :], logits, mask=is_asking[:, None] & is_unit[None, :])
    tl.store(sums_ptr + row * tl.num_programs(0) + tile, total, mask=is_asking)


@triton.jit
def _shares_kernel(
    logits_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    eligible_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    num_units: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    num_together: tl.tensor,
    eligible_stride: tl.tensor,
    UNITS: tl.constexpr,
    IS_MAX: tl.constexpr,
) -> None:
    # One program: UNITS units of the partitions that select together. Reads their logits once.
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    is_unit = unit < num_units
    together = tl.program_id(1).to(tl.int64)
    scores = tl.zeros((UNITS,), dtype=tl.float32)
    row = together * num_together * num_heads * num_tokens
    for _ in range(num_together):
        agreed = tl.zeros((UNITS,), dtype=tl.float32)
        for _ in range(num_heads):
            share = tl.zeros((UNITS,), dtype=tl.float32)
            for _ in range(num_tokens):
                logits = tl.load(logits_ptr + row * num_units + unit, mask=is_unit, other=float("-inf"))
                share += tl.exp(logits - tl.load(sums_ptr + row))
                row += 1
            if IS_MAX:
                agreed = tl.maximum(agreed, share)
            else:
                agreed += share / num_heads
        scores += agreed / num_tokens
    if eligible_ptr is not None:
        eligible = tl.load(eligible_ptr + together * eligible_stride + unit, mask=is_unit, other=0)
        scores = tl.where(eligible != 0, scores, float("-inf"))
    tl.store(scores_ptr + together * num_units + unit, scores, mask=is_unit)


def score_units(lifted: Tensor, summaries: Tensor, is_eligible: Tensor | None, agreement: Agreement) -> Tensor:
    """See `kvstore.kernels.scoring_reference.score_units`; equal to it up to the order of sums. No sync.

    Vectors and rows of `is_eligible` lie adjacent.
    """
    check_scoring(lifted, summaries, agreement)
    num_partitions, num_asking, width = lifted.shape
    num_units, together = summaries.shape[1], agreement.num_together
    scores = torch.empty(num_partitions // together, num_units, dtype=torch.float32, device=lifted.device)
    if scores.numel() == 0:
        return scores
    num_tiles = triton.cdiv(num_units, _UNITS)
    grid = (num_tiles, scores.shape[0])
    eligible_stride = is_eligible.stride(0) if is_eligible is not None and is_eligible.shape[0] > 1 else 0
    if agreement.group == "sum":
        sum_kernel: Any = _sum_kernel[grid]
        sum_kernel(
            lifted,
            summaries,
            is_eligible,
            scores,
            num_units,
            width,
            together,
            lifted.stride(0),
            *summaries.stride()[:2],
            eligible_stride,
            UNITS=_UNITS,
            WIDTH=_WIDTH,
        )
        return scores
    logits = torch.empty(num_partitions, num_asking, num_units, dtype=torch.float32, device=lifted.device)
    sums = torch.empty(num_partitions, num_asking, num_tiles, dtype=torch.float32, device=lifted.device)
    asking = min(max(triton.next_power_of_2(num_asking), 16), 64)
    logits_kernel: Any = _logits_kernel[(num_tiles, num_partitions, triton.cdiv(num_asking, asking))]
    logits_kernel(
        lifted,
        summaries,
        logits,
        sums,
        agreement.scale,
        num_units,
        num_asking,
        width,
        *lifted.stride()[:2],
        *summaries.stride()[:2],
        ASKING=asking,
        UNITS=_UNITS,
        WIDTH=_WIDTH,
    )
    shares_kernel: Any = _shares_kernel[grid]
    shares_kernel(
        logits,
        sums.logsumexp(dim=2),
        is_eligible,
        scores,
        num_units,
        num_asking // agreement.num_tokens,
        agreement.num_tokens,
        together,
        eligible_stride,
        UNITS=_UNITS,
        IS_MAX=agreement.group == "softmax_max",
    )
    return scores
