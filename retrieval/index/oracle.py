# SPDX-License-Identifier: Apache-2.0
"""Exact search by the definition, in float64: what indices are compared with in tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def exact_scores(rows: Tensor, queries: Tensor) -> Tensor:
    """Inner products of `[num_partitions, num_queries, width]` queries with `[num_partitions, num_rows, width]` rows.

    Returns:
        [num_partitions, num_queries, num_rows] float32, summed in float64.
    """
    products = np.einsum("pqw,pnw->pqn", queries.double().cpu().numpy(), rows.double().cpu().numpy())
    return torch.from_numpy(products.astype(np.float32))


def best_rows(
    rows: Tensor, queries: Tensor, k: int, end: int | None = None, removed: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """See `PartitionedIndex.search`; of equal scores the row with the lower number comes first."""
    scores = exact_scores(rows, queries).numpy()[:, :, : None if end is None else max(end, 0)]
    living = np.setdiff1d(np.arange(scores.shape[2]), np.asarray(removed, dtype=np.int64))
    order = np.argsort(-scores[:, :, living], axis=2, kind="stable")[:, :, :k]
    found = living[order]
    return torch.from_numpy(np.take_along_axis(scores, found, axis=2)), torch.from_numpy(found)


def recall(found: Tensor, wanted: Tensor) -> float:
    """Share of `wanted` rows, `[..., k]`, that are among those found, whatever their order."""
    return float((wanted[..., :, None] == found[..., None, :]).any(dim=-1).float().mean())
