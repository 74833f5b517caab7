# SPDX-License-Identifier: Apache-2.0
"""Rows of vectors, partition by partition: an index over the units of one layer has one partition per KV head."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvstore.errors import ShapeError

LARGEST = 1e30
"""Of a row's elements: beyond it, differences and products leave what float32 holds."""


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

    def scores(self, queries: Tensor, end: int | None = None) -> Tensor:
        """Inner products of `[num_partitions, num_queries, width]` float32 queries with the rows.

        Args:
            queries: one group per partition.
            end: only rows below this number; None for all.

        Returns:
            [num_partitions, num_queries, min(end, num_rows)] float32.
        """

    def search(self, queries: Tensor, k: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Find the rows with the largest inner products.

        Args:
            queries: [num_partitions, num_queries, width] float32.
            k: rows wanted per query.
            end: only rows below this number, such as those that were there when the question was asked; None for all.

        Returns:
            (scores, rows): `[num_partitions, num_queries, min(k, end, num_rows)]` float32 and int64, best first.
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

    @property
    def room(self) -> Tensor:
        """[num_partitions, capacity, width] float32, contiguous: the rows, and room for more."""
        return self._rows

    def add(self, rows: Tensor) -> None:
        """See `PartitionedIndex`."""
        check_partitions(rows, self._rows.shape[0], self._rows.shape[2])
        needed = self._num_rows + rows.shape[1]
        if needed > self._rows.shape[1]:
            grown = torch.empty(self._rows.shape[0], max(needed, 2 * self._rows.shape[1]), self._rows.shape[2])
            grown[:, : self._num_rows] = self._rows[:, : self._num_rows]
            self._rows = grown
        self._rows[:, self._num_rows : needed] = rows
        self._num_rows = needed

    def scores(self, queries: Tensor, end: int | None = None) -> Tensor:
        """See `PartitionedIndex`."""
        check_partitions(queries, self._rows.shape[0], self._rows.shape[2])
        return torch.bmm(queries, self._rows[:, : rows_below(end, self._num_rows)].transpose(1, 2))

    def search(self, queries: Tensor, k: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """See `PartitionedIndex`."""
        scores = self.scores(queries, end)
        found = scores.topk(min(k, scores.shape[-1]), dim=-1)
        return found.values, found.indices


def rows_below(end: int | None, num_rows: int) -> int:
    """How many of `num_rows` rows have numbers below `end`."""
    return num_rows if end is None else min(max(end, 0), num_rows)


def check_partitions(rows: Tensor, num_partitions: int, width: int) -> None:
    """Raise `ShapeError` unless `rows` is `[num_partitions, n, width]` float32."""
    if rows.dim() != 3 or rows.shape[0] != num_partitions or rows.shape[2] != width or rows.dtype != torch.float32:
        raise ShapeError(f"rows are [{num_partitions}, n, {width}] float32; got {list(rows.shape)} {rows.dtype}")


def check_finite(rows: Tensor) -> None:
    """Raise `ShapeError` when an element is no number, infinite or too large: it would spoil its whole segment."""
    if not rows.numel():
        return
    low, high = torch.aminmax(rows)  # makes no copy, and is no number where an element is none
    if not -LARGEST <= float(low) <= float(high) <= LARGEST:
        raise ShapeError(f"rows of an index hold finite numbers up to {LARGEST}")
