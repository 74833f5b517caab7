# SPDX-License-Identifier: Apache-2.0
"""Codings: how sealed rows of an index are kept, and how queries are compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SealedRows(Protocol):
    """Rows of all partitions that never change again; any thread may read them."""

    @property
    def num_rows(self) -> int:
        """Rows of each partition."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is kept of them; all of an index' memory but for a few objects per segment."""

    def decoded(self) -> Tensor:
        """As they are compared: `[num_partitions, num_rows, width]` float32."""

    def kept(self, wanted: Tensor) -> SealedRows:
        """Some of them, `[num_wanted]` int64 ascending, with the same scores as before."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one index is asked.

    Args:
        segments: rows one behind the other.
        queries: [num_partitions, num_queries, width] float32.
        scores: [num_partitions, num_queries, columns] float32, contiguous, to be written from column 0 on; at least as
            many columns as rows.
    """

    segments: Sequence[SealedRows]
    queries: Tensor
    scores: Tensor


class Coding(Protocol):
    """Turns rows into sealed ones, and scores them."""

    @property
    def device(self) -> torch.device:
        """Where rows are kept and scores are made."""

    def seal(self, rows: Tensor) -> SealedRows:
        """Encode `[num_partitions, num_rows, width]` float32 rows; the same rows are always coded alike."""

    def score(self, asked: Sequence[Asked]) -> None:
        """Write the inner products of queries and rows, of several indices at once."""
