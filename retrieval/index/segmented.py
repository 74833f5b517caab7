# SPDX-License-Identifier: Apache-2.0
"""The index that grows while it is searched: sealed segments, and a short tail of rows as they came."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.retrieval.index.byte_rows import ByteCoding
from kvstore.retrieval.index.coding import Coding, SealedRows
from kvstore.retrieval.index.float_rows import FloatRows
from kvstore.retrieval.index.lasting import lasting
from kvstore.retrieval.index.partitions import check_finite, check_partitions
from kvstore.retrieval.index.segment import SEGMENT_ROWS, Segment
from kvstore.retrieval.index.snapshot import Body, Snapshot

_Form = list[tuple[tuple[int, ...], torch.dtype]]


class SegmentedIndex:
    """Rows in sealed segments of one coding, the last ones exact in a tail.

    Searches take no lock: they read the last snapshot that the writer published, so each sees the rows that had been
    added at one moment, whole. Adding never moves rows that are sealed, and coding a segment costs the same at any
    size. Where a segment ends depends on the rows alone, so an index that is built anew gives the same scores.
    Thread-safe; changes wait for one another.

    Args:
        num_partitions: one per KV head.
        width: elements of a row.
        coding: of sealed segments; a byte per element by default.
        segment_rows: rows of a segment.
    """

    def __init__(
        self, num_partitions: int, width: int, coding: Coding | None = None, segment_rows: int = SEGMENT_ROWS
    ) -> None:
        if min(num_partitions, width, segment_rows) < 1:
            raise ConfigError(f"an index has partitions, elements, rows; got {num_partitions}, {width}, {segment_rows}")
        self._segment_rows = segment_rows
        self._writing = threading.Lock()
        coding = coding or ByteCoding()
        self._snapshot = Snapshot(coding, Body(), torch.empty(num_partitions, 0, width, device=coding.device))

    @property
    def num_rows(self) -> int:
        """Rows added so far; removed ones count, since numbers are never given again."""
        return self._snapshot.num_rows

    @property
    def nbytes(self) -> int:
        """Memory of rows, numbers and marks, and the tail's room."""
        return self._snapshot.nbytes

    def snapshot(self) -> Snapshot:
        """The index as it is now, for several searches of the same rows."""
        return self._snapshot

    def scores(self, queries: Tensor, end: int | None = None) -> Tensor:
        """See `PartitionedIndex`; -inf for removed rows."""
        return self._snapshot.scores(queries, end)

    def search(self, queries: Tensor, k: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """See `PartitionedIndex`; removed rows are not found."""
        return self._snapshot.search(queries, k, end)

    def add(self, rows: Tensor) -> None:
        """Append `[num_partitions, num_new, width]` float32 rows.

        Raises:
            ShapeError: another shape or dtype, or elements that are not finite; nothing was added.
        """
        check_partitions(rows, self._snapshot.tail.shape[0], self._snapshot.tail.shape[2])
        check_finite(rows)
        with self._writing:
            self._add(rows)

    def remove(self, numbers: Tensor) -> None:
        """Remove rows by number, `[any]` int64, in all partitions; those that are gone already are passed over.

        Raises:
            ShapeError: a row that was never added.
        """
        with self._writing:
            now = self._snapshot
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < now.num_rows:
                raise ShapeError(f"rows to remove are among {now.num_rows}; got {int(numbers.min())} and others")
            if not numbers.numel():
                return
            lowest, highest = int(numbers.min()), int(numbers.max())
            left = (
                segment.without(numbers) if segment.first <= highest and segment.end > lowest else segment
                for segment in now.body.segments
            )
            dead = torch.isin(torch.arange(now.body.end, now.num_rows), numbers)
            if now.tail_dead is not None:
                dead |= now.tail_dead
            body = Body(tuple(segment for segment in left if segment is not None), now.body.end)
            self._snapshot = replace(now, body=body, tail_dead=dead if bool(dead.any()) else None)

    def dump(self) -> list[Segment]:
        """All rows, to be kept elsewhere: the sealed segments, then the tail as it is, float32.

        A segment that was dumped once changes only by `remove`.
        """
        now = self._snapshot
        segments = list(now.body.segments)
        if now.tail_rows:
            rows = FloatRows(now.tail[:, : now.tail_rows].contiguous())
            segments.append(Segment(now.body.end, now.num_rows, rows, None, now.tail_dead))
        return segments

    def load(self, segments: Iterable[Segment], num_rows: int) -> None:
        """Append what `dump` returned, of an index with the same coding; scores are the same as before.

        Args:
            segments: in order; rows of those that are missing count as removed.
            num_rows: of the index that was dumped, of which the last rows may all have been removed.

        Raises:
            ShapeError: a segment does not fit behind the one before it, or has another shape or coding.
        """
        forms: dict[int, _Form] = {}
        with self._writing:
            for segment in segments:
                if segment.end > num_rows:
                    raise ShapeError(f"rows {segment.first} to {segment.end} are beyond the {num_rows} of the index")
                self._load(segment, forms)
            now = self._snapshot
            if now.num_rows < num_rows:
                if now.tail_rows:
                    raise ShapeError(
                        f"{num_rows - now.num_rows} rows of the tail behind {now.num_rows} others are missing"
                    )
                self._snapshot = replace(now, body=Body(now.body.segments, num_rows))

    def _load(self, segment: Segment, forms: dict[int, _Form]) -> None:
        now = self._snapshot
        if now.tail_rows or segment.first < now.body.end:
            raise ShapeError(f"rows {segment.first} to {segment.end} do not follow {now.num_rows} others")
        is_tail = segment.end - segment.first < self._segment_rows
        if is_tail:
            rows = segment.rows.decoded().to(now.tail.device)
            check_partitions(rows, now.tail.shape[0], now.tail.shape[2])
            if segment.numbers is not None:
                raise ShapeError(f"rows {segment.first} to {segment.end} are a tail, and some are missing")
            self._snapshot = replace(now, body=Body(now.body.segments, segment.first))
            self._add(rows)
            self._snapshot = replace(self._snapshot, tail_dead=segment.dead)
            return
        count = segment.rows.num_rows
        if count not in forms:
            forms[count] = _form(now.coding.seal(torch.zeros(now.tail.shape[0], count, now.tail.shape[2])))
        if _form(segment.rows) != forms[count]:
            raise ShapeError(f"rows {segment.first} to {segment.end} are of another shape or coding than the index")
        self._snapshot = replace(now, body=Body((*now.body.segments, segment), segment.end))

    def _add(self, rows: Tensor) -> None:
        while rows.shape[1]:
            now = self._snapshot
            tail = now.tail if now.tail.shape[1] else self._room(now.tail)
            needed = min(now.tail_rows + rows.shape[1], self._segment_rows)
            taken = needed - now.tail_rows
            tail[:, now.tail_rows : needed] = rows[:, :taken]  # readers see none of it until the snapshot says so
            rows = rows[:, taken:]
            dead = now.tail_dead
            if dead is not None:
                dead = torch.cat([dead, torch.zeros(taken, dtype=torch.bool)])
            grown = replace(now, tail=tail, tail_rows=needed, tail_dead=dead)
            if needed == self._segment_rows:
                self._seal(grown, tail)
            else:
                self._snapshot = grown

    def _room(self, like: Tensor) -> Tensor:
        """Room for a whole tail; memory is taken only as rows come."""
        shape = (like.shape[0], self._segment_rows, like.shape[2])
        return lasting(shape, like.dtype) if like.device.type == "cpu" else like.new_empty(shape)

    def _seal(self, now: Snapshot, rows: Tensor) -> None:
        first, end = now.body.end, now.body.end + self._segment_rows
        segment: Segment | None = Segment(first, end, now.coding.seal(rows))
        if segment is not None and now.tail_dead is not None:
            segment = segment.without(now.tail_dead.nonzero()[:, 0] + first)
        segments = now.body.segments if segment is None else (*now.body.segments, segment)
        # A tail of its own: readers of older snapshots still read the one that was sealed.
        empty = now.tail.new_empty(now.tail.shape[0], 0, now.tail.shape[2])
        self._snapshot = Snapshot(now.coding, Body(segments, end), empty)


def _form(rows: SealedRows) -> _Form:
    """By which rows of another shape or coding are told."""
    return [(tuple(part.shape), part.dtype) for part in rows.parts]
