# SPDX-License-Identifier: Apache-2.0
"""One budget for several layers: what each chose by itself is chosen anew, by the same scores."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.retrieval.memory import LayerMemory, Selection
from kvstore.retrieval.selectors.budget import SharingSelector
from kvstore.retrieval.unit_table import list_rows


def share_budget(
    memories: Sequence[LayerMemory],
    made: Sequence[Selection],
    selector: SharingSelector,
    budget_tokens: int,
    end: int | None = None,
) -> list[Selection]:
    """Choose anew what several layers read, of one budget, by the scores that they chose by.

    Args:
        memories: of the layers; nothing was added since they chose.
        made: what each of them chose by itself.
        selector: chooses.
        budget_tokens: per KV head, on average over all layers.
        end: as they chose; see `LayerMemory.select`.
    """
    whole = [list_rows([memory.table.sizes], each.scores.shape[0]) for memory, each in zip(memories, made, strict=True)]
    sizes = whole
    if end is not None:
        before = [memory.table.sizes_before(end) for memory in memories]
        sizes = [list_rows([table], each.scores.shape[0]) for table, each in zip(before, made, strict=True)]
    fits = [
        some.where(some > 0, full).expand_as(each.scores) for some, full, each in zip(sizes, whole, made, strict=True)
    ]
    lists = selector.select_together([each.scores for each in made], fits, budget_tokens)
    shared = []
    for memory, each, chosen, some, full in zip(memories, made, lists, sizes, whole, strict=True):
        units = tuple(row.nonzero()[:, 0] for row in chosen)
        estimated = memory.estimate(each.scores, chosen, (some < full).expand_as(chosen))
        shared.append(Selection(memory.table.tokens_of(units, end), units, chosen, each.scores, *estimated))
    return shared
