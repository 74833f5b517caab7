# SPDX-License-Identifier: Apache-2.0
"""Standard scores under a token budget in one native call: what `StandardScores` and `TokenBudget` say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.native import choose_units
from kvstore.retrieval.fusion import Fusion, StandardScores
from kvstore.retrieval.selectors.budget import Selector, TokenBudget
from kvstore.retrieval.unit_table import UnitTable


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is read of units, list by list.

    Args:
        scores: [num_lists, num_units] float32: fused; -inf for units that may not be chosen.
        marks: [num_lists, num_units] bool: units that are.
        units: the same as numbers, ascending: [num_chosen] int64 each.
        tokens: those of them that may be read, ascending: [num_tokens] int64 each.
    """

    scores: Tensor
    marks: Tensor
    units: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]


class Room:
    """Where a native call writes what is chosen.

    Args:
        num_lists: lists that choose.
        num_units: of each.
        num_tokens: of all units of a list.
        most_tokens: that a list may read.
    """

    def __init__(self, num_lists: int, num_units: int, num_tokens: int, most_tokens: int) -> None:
        self._most_tokens = most_tokens = min(most_tokens, num_tokens)
        self._most_units = most_units = min(most_tokens, num_units)
        self._fused = torch.empty(num_lists, num_units)
        self._marks = torch.empty(num_lists, num_units, dtype=torch.bool)
        self._numbers = torch.empty(num_lists * (most_units + most_tokens + 2), dtype=torch.int64)
        numbers, tokens_at, counts_at = self._numbers.numpy(), num_lists * most_units, -2 * num_lists
        self._counts = numbers[counts_at:]
        self.buffers = [
            self._fused.numpy().data,
            self._marks.numpy().data,
            numbers[:tokens_at].data,
            numbers[tokens_at:counts_at].data,
            self._counts.data,
        ]
        """Fused scores, marks, units, tokens, counts."""

    def chosen(self) -> Chosen:
        """What was written."""
        counts = self._counts.tolist()
        sizes = []
        for num_units in counts[::2]:
            sizes += [num_units, self._most_units - num_units]
        for num_tokens in counts[1::2]:
            sizes += [num_tokens, self._most_tokens - num_tokens]
        parts = self._numbers.split_with_sizes([*sizes, len(counts)])
        return Chosen(self._fused, self._marks, parts[: len(counts) : 2], parts[len(counts) : -1 : 2])


def choose(
    fusion: Fusion,
    selector: Selector,
    views: Sequence[Tensor],
    table: UnitTable,
    end: int | None,
    budget_tokens: int,
) -> Chosen | None:
    """Choose units of a table that serves all lists.

    Args:
        fusion: of the views.
        selector: says which units a score earns a place.
        views: [num_lists, num_units] float32 scores, or fewer lines, each for as many lists one behind the other.
        table: the units.
        end: only tokens before this one; None for all.
        budget_tokens: most tokens of a list; the best unit is taken in any case.

    Returns:
        None where that is not what a native call does: other strategies, units that are not pages, scores that are not
        finite.
    """
    is_native = isinstance(fusion, StandardScores) and isinstance(selector, TokenBudget) and table.is_ascending
    if not is_native or len(views) < 2 or not table.has_one_list or table.num_units == 0 or budget_tokens < 0:
        return None
    assert isinstance(fusion, StandardScores), "just checked"
    columns = table.columns(end)
    num_lists, num_units = max(each.shape[0] for each in views), table.num_units
    room = Room(num_lists, num_units, table.num_tokens, max(budget_tokens, int(columns[2].max())))
    weights = fusion.weights or (1.0,) * len(views)
    shares = fusion.neighbours or (0.0,) * len(views)
    is_done = choose_units(
        [
            (each.float().contiguous().numpy().data, weight, share)
            for each, weight, share in zip(views, weights, shares, strict=True)
        ],
        [column.numpy().data for column in columns],
        budget_tokens,
        num_lists,
        room.buffers,
    )
    return room.chosen() if is_done else None
