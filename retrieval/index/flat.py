# SPDX-License-Identifier: Apache-2.0
"""The index protocol, and the exact index that needs nothing but torch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvstore.errors import ShapeError

_CHUNK_ROWS = 65536
_MERGED_ROWS = 4096


class SummaryIndex(Protocol):
    """Rows of vectors searched by inner product; a row's number is the order in which it was added."""

    @property
    def num_rows(self) -> int:
        """Rows added so far."""

    def add(self, rows: Tensor) -> None:
        """Append rows.

        Args:
            rows: [num_rows, dim] float32, CPU.
        """

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the rows with the largest inner products.

        Args:
            queries: [num_queries, dim] float32, CPU.
            k: rows wanted per query.

        Returns:
            (scores, rows): `[num_queries, min(k, num_rows)]` float32 and int64, best first.
        """


class FlatIndex:
    """Exact search by matrix product, float16 rows, float32 sums.

    Serves where FAISS is not installed, and as the oracle for the others. Not thread-safe.

    Args:
        dim: elements of a row.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._chunks: list[Tensor] = []
        self._num_rows = 0

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return self._num_rows

    def add(self, rows: Tensor) -> None:
        """Append `[num_rows, dim]` float32 rows; see `SummaryIndex.add`.

        Raises:
            ShapeError: wrong number of elements per row.
        """
        check_rows(rows, self._dim)
        if self._chunks and self._chunks[-1].shape[0] + rows.shape[0] <= _MERGED_ROWS:
            self._chunks[-1] = torch.cat([self._chunks[-1], rows.half()])
        else:
            self._chunks.append(rows.half())
        self._num_rows += rows.shape[0]

    def rows(self) -> Tensor:
        """All rows, as they are kept: `[num_rows, dim]` float16."""
        return torch.cat([torch.empty(0, self._dim, dtype=torch.float16), *self._chunks])

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SummaryIndex.search`."""
        check_rows(queries, self._dim)
        k = min(k, self._num_rows)
        best = torch.empty(queries.shape[0], 0)
        best_rows = torch.empty(queries.shape[0], 0, dtype=torch.int64)
        first = 0
        for chunk in self._chunks:
            for part in chunk.split(_CHUNK_ROWS):
                scores = queries @ part.float().T
                rows = torch.arange(first, first + part.shape[0]).expand_as(scores)
                joined = torch.cat([best, scores], dim=1)
                best, order = joined.topk(min(k, joined.shape[1]), dim=1)
                best_rows = torch.cat([best_rows, rows], dim=1).gather(1, order)
                first += part.shape[0]
        return best, best_rows


def check_rows(rows: Tensor, dim: int) -> None:
    """Refuse vectors that do not fit an index of `dim` elements.

    Raises:
        ShapeError: not `[any, dim]` float32 on the CPU.
    """
    if rows.dim() != 2 or rows.shape[1] != dim or rows.dtype != torch.float32 or rows.device.type != "cpu":
        raise ShapeError(f"index rows are [n, {dim}] float32 on cpu; got {list(rows.shape)} {rows.dtype} {rows.device}")
