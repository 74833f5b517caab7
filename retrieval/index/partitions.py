# SPDX-License-Identifier: Apache-2.0
"""Rows of vectors, partition by partition: an index over the units of one layer has one partition per KV head."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvstore.errors import ShapeError


class PartitionedIndex(Protocol):
    """Equally many rows in every partition; a row's number is the order in which it was added."""

    @property
    def num_rows(self) -> int:
        """Rows added so far, in each partition."""

    def add(self, rows: Tensor) -> None:
        """Append `[num_partitions, num_new, width]` float32 rows.

        Raises:
            ShapeError: another number of partitions or elements.
        """

    def scores(self, queries: Tensor) -> Tensor:
        """Inner products of `[num_partitions, num_queries, width]` float32 queries with all rows.

        Returns:
            [num_partitions, num_queries, num_rows] float32.
        """

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the rows with the largest inner products.

        Args:
            queries: [num_partitions, num_queries, width] float32.
            k: rows wanted per query.

        Returns:
            (scores, rows): `[num_partitions, num_queries, min(k, num_rows)]` float32 and int64, best first.
        """


class MatrixIndex:
    """Exact search by one batched matrix product; rows in one growing buffer. Not thread-safe.

    Args:
        num_partitions: one per KV head.
        width: elements of a row.
    """

    def __init__(self, num_partitions: int, width: int) -> None:
        self._rows = torch.empty(num_partitions, 0, width)
        self._num_rows = 0

    @property
    def num_rows(self) -> int:
        """See `PartitionedIndex`."""
        return self._num_rows

    def add(self, rows: Tensor) -> None:
        """See `PartitionedIndex`."""
        check_partitions(rows, self._rows)
        needed = self._num_rows + rows.shape[1]
        if needed > self._rows.shape[1]:
            grown = torch.empty(self._rows.shape[0], max(needed, 2 * self._rows.shape[1]), self._rows.shape[2])
            grown[:, : self._num_rows] = self._rows[:, : self._num_rows]
            self._rows = grown
        self._rows[:, self._num_rows : needed] = rows
        self._num_rows = needed

    def scores(self, queries: Tensor) -> Tensor:
        """See `PartitionedIndex`."""
        check_partitions(queries, self._rows)
        return torch.bmm(queries, self._rows[:, : self._num_rows].transpose(1, 2))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `PartitionedIndex`."""
        found = self.scores(queries).topk(min(k, self._num_rows), dim=-1)
        return found.values, found.indices


def check_partitions(rows: Tensor, wanted: Tensor) -> None:
    """Raise `ShapeError` unless `rows` has the partitions and the width of `wanted`, as float32."""
    if rows.dim() != 3 or rows.shape[0] != wanted.shape[0] or rows.shape[2] != wanted.shape[2]:
        raise ShapeError(
            f"rows are [{wanted.shape[0]}, n, {wanted.shape[2]}] float32; got {list(rows.shape)} {rows.dtype}"
        )
