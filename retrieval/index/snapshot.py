# SPDX-License-Identifier: Apache-2.0
"""An index at one moment: what searches read, and nothing changes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvstore.retrieval.index.coding import Asked, Coding
from kvstore.retrieval.index.partitions import check_partitions, rows_below
from kvstore.retrieval.index.segment import Segment

_RUN_COLUMNS = 64


# Not slotted: what is derived is kept beside the fields.
@dataclass(frozen=True)
class Body:
    """All sealed rows of an index.

    Args:
        segments: in order of their rows' numbers.
        end: number behind the last row, removed ones included.
    """

    segments: tuple[Segment, ...] = ()
    end: int = 0

    @cached_property
    def firsts(self) -> list[int]:
        """Number of each segment's first row."""
        return [segment.first for segment in self.segments]

    @cached_property
    def num_columns(self) -> int:
        """Rows that are compared with a query."""
        return sum(segment.rows.num_rows for segment in self.segments)

    @cached_property
    def numbers(self) -> Tensor | None:
        """[num_columns] int64: numbers of the rows; None where no row was left out."""
        if self.num_columns == self.end:
            return None
        return torch.cat([torch.empty(0, dtype=torch.int64), *(each.all_numbers() for each in self.segments)])

    @cached_property
    def dead(self) -> Tensor | None:
        """[num_columns] bool: removed rows that are still there; None for none."""
        if all(segment.dead is None for segment in self.segments):
            return None
        return torch.cat([segment.marks() for segment in self.segments])

    def below(self, end: int) -> tuple[tuple[Segment, ...], int]:
        """Segments with rows below `end`, and how many rows of theirs are below."""
        if end >= self.end:
            return self.segments, self.num_columns
        segments = self.segments[: bisect_left(self.firsts, end)]
        if not segments:
            return (), 0
        return segments, sum(each.rows.num_rows for each in segments[:-1]) + segments[-1].columns_below(end)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An index at one moment. Any thread may search it, for as long as it likes.

    Args:
        coding: of the body.
        body: sealed rows.
        tail: [num_partitions, capacity, width] float32: the rows behind them. The writer fills what is beyond
            `tail_rows`, which nobody reads here.
        tail_rows: rows of the tail.
        tail_dead: [tail_rows] bool: removed rows of the tail; None for none.
    """

    coding: Coding
    body: Body
    tail: Tensor
    tail_rows: int = 0
    tail_dead: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Rows added before this moment; removed ones count."""
        return self.body.end + self.tail_rows

    @property
    def nbytes(self) -> int:
        """Memory of rows, numbers and marks, and the tail's room."""
        return sum(segment.nbytes for segment in self.body.segments) + self.tail.nbytes

    def scores(self, queries: Tensor, end: int | None = None) -> Tensor:
        """See `PartitionedIndex`; -inf for removed rows."""
        question = self.question(queries, end)
        if question.asked.segments:
            self.coding.score([question.asked])
        scores = question.finished()
        if question.numbers is None:
            return scores
        by_number = scores.new_full((*scores.shape[:2], rows_below(end, self.num_rows)), float("-inf"))
        return by_number.index_copy_(2, question.numbers.to(scores.device), scores)

    def search(self, queries: Tensor, k: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """See `PartitionedIndex`; removed rows are not found."""
        return search_together([self], [queries], k, end)[0]

    def question(self, queries: Tensor, end: int | None) -> Question:
        """Prepare a search: all but the scores of the body."""
        check_partitions(queries, self.tail.shape[0], self.tail.shape[2])
        queries = queries.to(self.tail.device)
        end = rows_below(end, self.num_rows)
        segments, columns = self.body.below(end)
        rows = [segment.rows for segment in segments]
        scored = sum(each.num_rows for each in rows)
        of_tail = max(end - self.body.end, 0)
        met = _products(queries, self.tail[:, :of_tail])
        scores = met
        if scored:
            scores = torch.empty(*queries.shape[:2], scored + of_tail, device=queries.device)
            scores[:, :, scored:] = met
        numbers, dead = self.body.numbers, None
        if numbers is not None:
            numbers = torch.cat([numbers[:columns], torch.arange(self.body.end, self.body.end + of_tail)])
        if self.body.dead is not None or self.tail_dead is not None:
            dead = torch.cat([_marks(self.body.dead, columns), _marks(self.tail_dead, of_tail)])
        return Question(Asked(rows, queries, scores), columns + of_tail, numbers, dead)


@dataclass(frozen=True, slots=True)
class Question:
    """A search that lacks the scores of sealed rows.

    Args:
        asked: what the coding is to score.
        columns: how many of the scores count; those behind them are of rows that were not asked for.
        numbers: [columns] int64: numbers of the rows; None where they are the columns.
        dead: [columns] bool: removed rows; None for none.
    """

    asked: Asked
    columns: int
    numbers: Tensor | None
    dead: Tensor | None

    def finished(self) -> Tensor:
        """The scores that count: `[num_partitions, num_queries, columns]` float32, -inf for removed rows."""
        scores = self.asked.scores[:, :, : self.columns]
        return scores if self.dead is None else scores.masked_fill_(self.dead.to(scores.device), float("-inf"))

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the best `k` rows, best first."""
        living = self.columns if self.dead is None else int((~self.dead).sum())
        scores, columns = best_columns(self.finished(), min(k, living))
        return scores, columns if self.numbers is None else self.numbers.to(columns.device)[columns]


def search_together(
    snapshots: Sequence[Snapshot], queries: Sequence[Tensor], k: int, end: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Search several indices at once, such as those of all layers; threads share the rows of all of them.

    Args:
        snapshots: of the indices.
        queries: [num_partitions, num_queries, width] float32 for each.
        k: rows wanted per query.
        end: only rows below this number; None for all.

    Returns:
        For each index what `PartitionedIndex.search` returns.
    """
    questions = [each.question(asked, end) for each, asked in zip(snapshots, queries, strict=True)]
    by_coding: dict[Coding, list[Asked]] = {}
    for snapshot, question in zip(snapshots, questions, strict=True):
        by_coding.setdefault(snapshot.coding, []).append(question.asked)
    for coding, asked in by_coding.items():
        coding.score(asked)
    return [question.best(k) for question in questions]


def best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest along the last dimension and their places, largest first.

    The `k` largest are in the `k` runs with the largest maxima, and maxima cost a quarter of torch's `topk` of it all.
    """
    whole = scores.shape[-1] // _RUN_COLUMNS
    if whole < 4 * k:
        found = scores.topk(k, dim=-1)
        return found.values, found.indices
    runs = scores[..., : whole * _RUN_COLUMNS].unflatten(-1, (whole, _RUN_COLUMNS)).amax(dim=-1)
    places = torch.arange(_RUN_COLUMNS, device=scores.device)
    columns = (runs.topk(k, dim=-1, sorted=False).indices[..., None] * _RUN_COLUMNS + places).flatten(-2)
    rest = torch.arange(whole * _RUN_COLUMNS, scores.shape[-1], device=scores.device)
    columns = torch.cat([columns, rest.expand(*columns.shape[:-1], -1)], dim=-1)
    found = scores.gather(-1, columns).topk(k, dim=-1)
    return found.values, columns.gather(-1, found.indices)


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Inner products `[num_partitions, num_queries, num_rows]`; of one query, torch is twice as fast the other way."""
    if queries.shape[1] == 1:
        return torch.bmm(rows, queries.transpose(1, 2)).view(rows.shape[0], 1, rows.shape[1])
    return torch.bmm(queries, rows.transpose(1, 2))


def _marks(marks: Tensor | None, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool) if marks is None else marks[:count]
