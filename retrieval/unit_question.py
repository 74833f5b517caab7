# SPDX-License-Identifier: Apache-2.0
"""One layer asks all views of its units in one native call: what views, fusion and selector say one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kvstore.native import ByteRows as NativeRows
from kvstore.native import UnitRows
from kvstore.retrieval.fusion import StandardScores
from kvstore.retrieval.index.byte_rows import ByteCoding, ByteRows
from kvstore.retrieval.index.partitions import MatrixIndex, PartitionedIndex
from kvstore.retrieval.index.segmented import SegmentedIndex
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.bound import Bound
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.selectors.budget import Selector, TokenBudget
from kvstore.retrieval.tokens import LayerQuery
from kvstore.retrieval.unit_choice import Chosen, Room
from kvstore.retrieval.unit_table import UnitTable
from kvstore.retrieval.view import Group, Pool, View

_ANY_END = 1 << 62
_Rows = tuple[list[NativeRows], list[tuple[memoryview, int]]]


@dataclass(frozen=True, slots=True)
class _Held:
    """Units as they were at one moment, and the rows that are compared: until either changes, questions need no more.

    Args:
        states: of the indices that hold the rows.
        before: tokens of each unit that may be read.
        native: the rows.
        num_lists: that choose.
        longest_unit: tokens of the unit with most of them.
    """

    states: list[tuple[object, int]]
    before: Tensor
    native: UnitRows
    num_lists: int
    longest_unit: int


class UnitQuestions:
    """Asks for one layer. Not thread-safe.

    Args:
        policy: says how.
        selector: the layer's.
    """

    def __init__(self, policy: Policy, selector: Selector) -> None:
        self._views = policy.views
        self._spaces = tuple(view.space for view in policy.views)
        fusion = policy.fusion
        is_native = isinstance(selector, TokenBudget) and policy.estimated_share == 0 and len(policy.views) > 1
        is_native &= all(map(_is_one_product, policy.views))
        self._fusion = fusion if is_native and isinstance(fusion, StandardScores) else None
        self._held: _Held | None = None

    def choose(
        self,
        indices: Sequence[Sequence[PartitionedIndex]],
        table: UnitTable,
        query: LayerQuery,
        end: int | None,
        budget_tokens: int,
    ) -> Chosen | None:
        """Choose units by the last query.

        Args:
            indices: those of each view, one behind the other, that together have a row for each unit.
            table: the units.
            query: see `LayerMemory.select`, like the rest.
            end: likewise.
            budget_tokens: likewise.

        Returns:
            None where that is not what a native call does: strategies that the views above, a sum of standard scores
            and a budget of tokens are not, units that are not pages, rows that are removed or elsewhere, rotations
            of other than halves, scores that are not finite.

        Raises:
            ConfigError: queries come rotated, and a view wants them otherwise.
        """
        if self._fusion is None or budget_tokens < 0 or not table.num_units:
            return None
        kv_heads, group, _, dim = query.query.shape
        held = self._held_now(indices, table, kv_heads, _ANY_END if end is None else end)
        if held is None:
            return None
        turns = query.last_turns(self._spaces)
        if turns is None:
            return None
        queries = query.query[:, :, -1].detach().cpu().float().contiguous()
        room = Room(held.num_lists, table.num_units, table.num_tokens, max(budget_tokens, held.longest_unit))
        is_done = held.native.choose(
            queries.numpy().data,
            turns.numpy().data,
            (kv_heads, group, dim),
            budget_tokens,
            held.num_lists,
            torch.get_num_threads(),
            room.buffers,
        )
        return room.chosen() if is_done else None

    def _held_now(
        self, indices: Sequence[Sequence[PartitionedIndex]], table: UnitTable, kv_heads: int, end: int
    ) -> _Held | None:
        """What questions compare with; None where it is not for this."""
        states = [_state(index) for of_view in indices for index in of_view]
        before = table.sizes_before(end)
        held = self._held
        if held is not None and held.before is before:
            pairs = zip(held.states, states, strict=True)
            if all(had is has and had_rows == has_rows for (had, had_rows), (has, has_rows) in pairs):
                return held
        self._held = None  # it would keep memory of what is no more
        fusion, rows = self._fusion, [_rows(of_view) for of_view in indices]
        if fusion is None or not table.is_ascending or not table.has_one_list:
            return None
        weights = fusion.weights or (1.0,) * len(self._views)
        shares = fusion.neighbours or (0.0,) * len(self._views)
        asked = []
        for view, of_view, weight, share in zip(self._views, rows, weights, shares, strict=True):
            if of_view is None:
                return None
            asked.append((*of_view, isinstance(view.scorer, Bound), view.is_shared, weight, share))
        starts, sizes, _, tokens = table.columns(end)
        native = UnitRows(asked, [each.numpy().data for each in (starts, sizes, before[0], tokens)])
        num_lists = 1 if all(view.is_shared for view in self._views) else kv_heads
        self._held = _Held(states, before, native, num_lists, int(before.max()))
        return self._held


def _is_one_product(view: View) -> bool:
    """Whether one inner product with a sum of the last queries is a head's score."""
    return view.pool is Pool.LAST and view.group is Group.SUM and isinstance(view.scorer, Bound | Dot)


def _state(index: PartitionedIndex) -> tuple[object, int]:
    """What is another one once an index has changed."""
    return (index.snapshot() if isinstance(index, SegmentedIndex) else index, index.num_rows)


def _rows(indices: Sequence[PartitionedIndex]) -> _Rows | None:
    """Sealed rows, and those behind them; None where they are not in this order, or not all alive and on the CPU."""
    segments: list[NativeRows] = []
    floats: list[tuple[memoryview, int]] = []
    for index in indices:
        if isinstance(index, MatrixIndex):
            room, num_rows = index.room, index.num_rows
        elif isinstance(index, SegmentedIndex) and not floats:
            now = index.snapshot()
            is_whole = now.body.numbers is None and now.body.dead is None and now.tail_dead is None
            if not is_whole or not isinstance(now.coding, ByteCoding):
                return None
            segments += [cast(ByteRows, segment.rows).native for segment in now.body.segments]
            room, num_rows = now.tail, now.tail_rows
        else:
            return None
        if num_rows:
            floats.append((room.numpy().data, num_rows))
    return segments, floats
