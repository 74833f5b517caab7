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

    def sizes_before(self, end: int) -> Tensor:
        """Tokens of each unit that come before token `end`: `[num_tables, num_units]` int64."""
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
        self._tokens.add(torch.stack([each.tokens for each in units]))
        self._starts.add(torch.stack([each.starts[:-1] + base for each in units]))
        self._sizes.add(torch.stack([each.sizes for each in units]))
        self._ends.add(torch.stack([each.tokens[each.starts[1:] - 1] + 1 for each in units]))

    def tokens_of(self, units: Sequence[Tensor], end: int | None = None) -> tuple[Tensor, ...]:
        """Tokens of chosen units, ascending.

        Args:
            units: [num_chosen] int64 each: for all KV heads together, or for each.
            end: only tokens before this one; None for all.

        Returns:
            As many as `units`, or one per KV head where tables differ: `[num_tokens]` int64.
        """
        if self._num_tables > 1 and len(units) == 1:
            units = list(units) * self._num_tables
        sizes = self.sizes
        found = []
        for number, chosen in enumerate(units):
            table = number if self._num_tables > 1 else 0
            count = sizes[table, chosen]
            places = torch.repeat_interleave(self._starts.used[table, chosen] - (count.cumsum(0) - count), count)
            tokens = self._tokens.used[table, places + torch.arange(places.shape[0])]
            found.append((tokens if end is None else tokens[tokens < end]).sort().values)
        return tuple(found)

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
