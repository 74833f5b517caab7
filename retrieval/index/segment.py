# SPDX-License-Identifier: Apache-2.0
"""Segments: runs of an index' rows that are coded once and never change; removed rows are marked, then left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvstore.retrieval.index.coding import SealedRows

SEGMENT_ROWS = 1024
"""Rows of a full segment. Fewer cost more in what a segment keeps once; more make a longer tail of uncoded rows."""

MOST_DEAD = 0.25
"""Share of removed rows from which a segment is written anew without them."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of all partitions with their numbers.

    Args:
        first: number of the first row that it ever held.
        end: number behind the last one.
        rows: those that it still holds.
        numbers: [num_rows] int64 ascending: their numbers; None for all from `first` to `end`.
        dead: [num_rows] bool: which of them are removed; None for none.
    """

    first: int
    end: int
    rows: SealedRows
    numbers: Tensor | None = None
    dead: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory of rows, numbers and marks."""
        extra = [part for part in (self.numbers, self.dead) if part is not None]
        return sum(part.nbytes for part in (*self.rows.parts, *extra))

    def all_numbers(self) -> Tensor:
        """Numbers of the rows: `[num_rows]` int64."""
        return torch.arange(self.first, self.end) if self.numbers is None else self.numbers

    def marks(self) -> Tensor:
        """Which rows are removed: `[num_rows]` bool."""
        return torch.zeros(self.rows.num_rows, dtype=torch.bool) if self.dead is None else self.dead

    def columns_below(self, end: int) -> int:
        """How many of the rows have numbers below `end`."""
        if self.numbers is None:
            return min(max(end - self.first, 0), self.rows.num_rows)
        return int((self.numbers < end).sum())

    def without(self, numbers: Tensor) -> Segment | None:
        """This segment after rows `[any]` int64 are removed; None when none is left.

        Above `MOST_DEAD` removed rows the others are copied together, with the same scores as before.
        """
        mine = self.all_numbers()
        dead = torch.isin(mine, numbers) | self.marks()
        count = int(dead.sum())
        if count == self.rows.num_rows:
            return None
        if count <= MOST_DEAD * self.rows.num_rows:
            return replace(self, dead=dead) if count else self
        wanted = (~dead).nonzero()[:, 0]
        return replace(self, rows=self.rows.kept(wanted), numbers=mine[wanted], dead=None)
