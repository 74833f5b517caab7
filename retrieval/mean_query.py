# SPDX-License-Identifier: Apache-2.0
"""One vector per block and layer, scored by its inner product with the mean query (ReKV, InfLLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.retrieval.index.flat import SummaryIndex
from kvstore.retrieval.selection import Ranking


class MeanQueryScorer:
    """Ranks the blocks of one layer.

    Args:
        index: an index over `[kv_heads * key_dim]` rows.
    """

    def __init__(self, index: SummaryIndex) -> None:
        self._index = index
        self._blocks: list[Tensor] = []

    def add(self, blocks: list[int], vectors: Tensor) -> None:
        """Add blocks: vectors `[len(blocks), kv_heads * key_dim]` float32."""
        if blocks:
            self._index.add(vectors)
            self._blocks.append(torch.tensor(blocks, dtype=torch.int64))

    def rank(self, queries: Tensor, limit: int) -> Ranking:
        """Rank blocks for a run of queries.

        Args:
            queries: [kv_heads, group, num_tokens, key_dim] query heads grouped by the KV head that they read, in the
                space in which the summaries were made.
            limit: most blocks to rank.

        The mean over tokens of the sum over a group ranks exactly as the mean over all query heads does, because the
        block's vector is the same for every head of a group.
        """
        if not self._index.num_rows:
            return Ranking(torch.empty(0, dtype=torch.int64), torch.empty(0))
        vector = queries.float().sum(dim=1).mean(dim=1).reshape(1, -1)
        scores, rows = self._index.search(vector, limit)
        return Ranking(torch.cat(self._blocks)[rows[0]], scores[0])
