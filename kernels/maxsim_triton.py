# SPDX-License-Identifier: Apache-2.0
"""The Triton twin of `best_similarity`: one kernel and its launcher."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_QUERIES = 16
_ROWS = 64
_DIM = 64


@triton.jit
def _best_similarity_kernel(
    question_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    row_starts_ptr: tl.tensor,
    best_ptr: tl.tensor,
    num_queries: tl.tensor,
    num_rows: tl.tensor,
    dim: tl.tensor,
    question_stride: tl.tensor,
    row_stride: tl.tensor,
    best_stride: tl.tensor,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    # One program: one block and QUERIES question tokens. Reads each row of the block once per program and keeps a
    # running maximum, so the matrix of similarities never exists.
    block = tl.program_id(0)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    is_query = query < num_queries
    first = tl.maximum(tl.load(row_starts_ptr + block), 0)
    end = tl.minimum(tl.load(row_starts_ptr + block + 1), num_rows)
    best = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    for begin in range(first, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        is_row = row < end
        products = tl.zeros((QUERIES, ROWS), dtype=tl.float32)
        for part in range(0, dim, DIM):
            lane = part + tl.arange(0, DIM)
            is_lane = lane < dim
            left = tl.load(
                question_ptr + query.to(tl.int64)[:, None] * question_stride + lane[None, :],
                mask=is_query[:, None] & is_lane[None, :],
                other=0.0,
            )
            right = tl.load(
                rows_ptr + row.to(tl.int64)[None, :] * row_stride + lane[:, None],
                mask=is_row[None, :] & is_lane[:, None],
                other=0.0,
            )
            products = tl.dot(left, right, products, input_precision="ieee")
        best = tl.maximum(best, tl.max(tl.where(is_row[None, :], products, float("-inf")), axis=1))
    tl.store(best_ptr + query.to(tl.int64) * best_stride + block, best, mask=is_query)


def best_similarity(question: Tensor, rows: Tensor, row_starts: Tensor) -> Tensor:
    """See `kvstore.kernels.reference.best_similarity`; equal to it up to the order of sums. No sync.

    Source: ColBERT (arXiv:2004.12832), MaxSim; here kept per block and question token.
    """
    num_queries, num_blocks = question.shape[0], row_starts.shape[0] - 1
    best = torch.empty(num_queries, num_blocks, dtype=torch.float32, device=question.device)
    if best.numel():
        kernel: Any = _best_similarity_kernel[(num_blocks, triton.cdiv(num_queries, _QUERIES))]
        kernel(
            question,
            rows,
            row_starts,
            best,
            num_queries,
            rows.shape[0],
            question.shape[1],
            question.stride(0),
            rows.stride(0),
            best.stride(0),
            QUERIES=_QUERIES,
            ROWS=_ROWS,
            DIM=_DIM,
        )
    return best
