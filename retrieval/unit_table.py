# SPDX-License-Identifier: Apache-2.0
"""Which tokens the units of a layer hold, in growing tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.retrieval.units import Units


class UnitTable:
    """Units by number, for all KV heads alike or for each by itself. Not thread-safe.

    Args:
        kv_heads: how many tables there may be.
    """

    def __init__(self, kv_heads: int) -> None:
        self._kv_heads = kv_heads
        self._tokens = _Growing()
        self._starts = _Growing()
        self._sizes = _Growing()
        self._ends = _Growing()
        self._num_tables = 0
        self.is_ascending = True
        """Whether tokens follow each other number by number, unit after unit, as those of pages do."""
        self._before: tuple[int, int, Tensor] | None = None

    @property
    def num_units(self) -> int:
        """Units of each table."""
        return self._starts.used.shape[-1] if self._num_tables else 0

    @property
    def num_tokens(self) -> int:
        """Tokens of each table."""
        return self._tokens.used.shape[-1] if self._num_tables else 0

    @property
    def sizes(self) -> Tensor:
        """Tokens of each unit: `[num_tables, num_units]` int64; `num_tables` is 1 or `kv_heads`."""
        return self._sizes.used

    @property
    def ends(self) -> Tensor:
        """Number behind the last token of each unit: `[num_tables, num_units]` int64."""
        return self._ends.used

    @property
    def has_one_list(self) -> bool:
        """Whether all KV heads are cut alike."""
        return self._num_tables <= 1

    def columns(self, end: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the one table that all heads have: units' starts in its tokens, sizes, sizes before `end`, and the tokens.

        All int64, of one dimension.
        """
        before = self.sizes if end is None else self.sizes_before(end)
        return self._starts.used[0], self.sizes[0], before[0], self._tokens.used[0]

    def sizes_before(self, end: int) -> Tensor:
        """Tokens of each unit that come before token `end`: `[num_tables, num_units]` int64; not to be written."""
        if self._before is None or self._before[:2] != (end, self.num_units):  # a question asks for the same each time
            self._before = (end, self.num_units, self._count_before(end))
        return self._before[2]

    def _count_before(self, end: int) -> Tensor:
        sizes = self.sizes.clone()
        table, unit = (self.ends > end).nonzero(as_tuple=True)
        count = sizes[table, unit]
        of_unit = torch.repeat_interleave(torch.arange(count.shape[0]), count)
        places = (self._starts.used[table, unit] - (count.cumsum(0) - count))[of_unit] + torch.arange(of_unit.shape[0])
        is_before = self._tokens.used[table[of_unit], places] < end
        sizes[table, unit] = torch.zeros_like(count).index_add_(0, of_unit, is_before.long())
        return sizes

    def add(self, units: Sequence[Units]) -> None:
        """Append units, one `Units` for all heads or one for each.

        Raises:
            ShapeError: they are not as many in every table, cover different numbers of tokens, or are of another kind
                than those before.
        """
        first = units[0]
        shapes = {(each.num_units, each.num_tokens) for each in units}
        if len(units) not in (1, self._kv_heads) or len(shapes) != 1 or self._num_tables not in (0, len(units)):
            raise ShapeError(f"units of {len(units)} tables, {sorted(shapes)}, behind those of {self._num_tables}")
        self._num_tables = len(units)
        base = self._tokens.num_columns
        if first.num_units == 0:
            return
        last = self._tokens.used[:, -1:] if base else torch.full((len(units), 1), -1)
        self._tokens.add(torch.stack([each.tokens for each in units]))
        new = self._tokens.used[:, base:]
        self.is_ascending &= bool((torch.cat([last, new], dim=1).diff(dim=1) > 0).all())
        self._starts.add(torch.stack([each.starts[:-1] + base for each in units]))
        self._sizes.add(torch.stack([each.sizes for each in units]))
        self._ends.add(torch.stack([each.tokens[each.starts[1:] - 1] + 1 for each in units]))

    def is_boundary(self, unit: int) -> bool:
        """Whether the units before this one hold the same tokens in every table, and no others before the last."""
        if unit in (0, self.num_units):
            return True
        starts = self._starts.used[:, unit]
        return bool((starts == starts[0]).all())

    def between(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Tokens and sizes of some units, from a boundary to a boundary: `[num_tables, any]` int64 each."""
        starts = self._starts.used
        columns = [int(starts[0, unit]) if unit < self.num_units else self.num_tokens for unit in (first, end)]
        return self._tokens.used[:, columns[0] : columns[1]], self.sizes[:, first:end]

    def cut_back(self, num_units: int) -> None:
        """Forget the last units, all but `num_units`, which hold the same tokens in every table."""
        if num_units < self.num_units:
            self._before = None
            self._tokens.num_columns = int(self._starts.used[0, num_units])
            for columns in (self._starts, self._sizes, self._ends):
                columns.num_columns = num_units

    def tokens_of(self, units: Sequence[Tensor], end: int | None = None) -> tuple[Tensor, ...]:
        """Tokens of chosen units, ascending.

        Args:
            units: [num_chosen] int64 each, ascending: for each KV head, or any number of lists where all heads, and all
                layers that they may be of, have one table.
            end: only tokens before this one; None for all.

        Returns:
            As many as `units`, or one per KV head where tables differ: `[num_tokens]` int64.
        """
        if self._num_tables <= 1:
            return self._tokens_of_lists(0, units, end)
        each = list(units) * (self._num_tables if len(units) == 1 else 1)
        return tuple(self._tokens_of_lists(table, [chosen], end)[0] for table, chosen in enumerate(each))

    def _tokens_of_lists(self, table: int, lists: Sequence[Tensor], end: int | None) -> tuple[Tensor, ...]:
        """Those of several lists out of one table, all in one go."""
        chosen = lists[0] if len(lists) == 1 else torch.cat(list(lists))
        whole = self.sizes[table, chosen] if self._num_tables else chosen
        kept = whole if end is None or not self._num_tables else self.sizes_before(end)[table, chosen]
        behind = whole.cumsum(0)
        total = int(behind[-1]) if behind.numel() else 0
        starts = self._starts.used[table, chosen] - (behind - whole) if total else behind
        tokens = self._tokens.used[
            table, torch.repeat_interleave(starts, whole, output_size=total) + torch.arange(total)
        ]
        if end is not None and not torch.equal(kept, whole):
            tokens, behind = tokens[tokens < end], kept.cumsum(0)
        last = torch.tensor([each.shape[0] for each in lists]).cumsum(0)
        lengths = torch.cat([last.new_zeros(1), behind])[last].diff(prepend=last.new_zeros(1)).tolist()
        found = tokens.split(lengths)
        return found if self.is_ascending else tuple(each.sort().values for each in found)

    def best_of_blocks(self, scores: Tensor, block_starts: Tensor) -> Tensor:
        """Give each unit the best score among the blocks that its tokens lie in.

        Args:
            scores: [num_blocks] float32.
            block_starts: [num_blocks] int64, ascending: each block's first token; the last block has no end.

        Returns:
            [num_tables, num_units] float32; -inf for units before the first block.

        Raises:
            ShapeError: not one start per score, or they do not ascend.
        """
        if scores.dim() != 1 or scores.shape != block_starts.shape or not bool((block_starts.diff() > 0).all()):
            raise ShapeError(f"{list(scores.shape)} scores of blocks, {list(block_starts.shape)} starts; they pair up")
        block = torch.bucketize(self._tokens.used, block_starts, right=True)
        of_token = torch.cat([scores.new_full((1,), float("-inf")), scores])[block]
        best = scores.new_full(self._starts.used.shape, float("-inf"))
        for table, sizes in enumerate(self.sizes):
            unit = torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes)
            best[table].scatter_reduce_(0, unit, of_token[table], "amax")
        return best


class _Growing:
    """Rows of int64 that grow to the right; memory doubles."""

    def __init__(self) -> None:
        self._buffer = torch.empty(1, 0, dtype=torch.int64)
        self.num_columns = 0

    @property
    def used(self) -> Tensor:
        return self._buffer[:, : self.num_columns]

    def add(self, columns: Tensor) -> None:
        needed = self.num_columns + columns.shape[1]
        if needed > self._buffer.shape[1]:
            grown = torch.empty(columns.shape[0], max(needed, 2 * self._buffer.shape[1]), dtype=torch.int64)
            if self.num_columns:
                grown[:, : self.num_columns] = self.used
            self._buffer = grown
        self._buffer[:, self.num_columns : needed] = columns
        self.num_columns = needed


def list_rows(tables: Sequence[Tensor], of_layer: int) -> Tensor:
    """A row for each list of scores from those of tables, by layer; one row where all are the same."""
    if of_layer == 1:  # one list: of tables that differ, the largest counts
        tables = [each.amax(dim=0, keepdim=True) for each in tables]
    if tables[0].shape[0] == 1 and all(each is tables[0] or torch.equal(each, tables[0]) for each in tables):
        return tables[0]
    return torch.cat([each.expand(of_layer, -1) for each in tables])
