# SPDX-License-Identifier: Apache-2.0
"""Late interaction: a block is scored by how closely its tokens' keys echo the question's keys."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvstore.retrieval.index.flat import SummaryIndex
from kvstore.retrieval.selection import Ranking

DEPTHS = (1 / 30, 9 / 30)
"""Depths, as fractions of the layers, whose keys are compared: one near the words, one that has seen the sentence."""

HITS_PER_TOKEN = 256
"""Nearest tokens taken per question token. The last of them is the floor that weighs the others: a word that stands in
every block has 256 perfect hits and so adds nothing, as an inverse document frequency would have it."""


def scored_layers(num_layers: int) -> tuple[int, ...]:
    """Layers whose keys are kept and compared, ascending, without repeats."""
    return tuple(sorted({min(round(depth * num_layers), num_layers - 1) for depth in DEPTHS}))


class MaxSimScorer:
    """Scores blocks by their tokens' best matches with each question token.

    For each question token the `HITS_PER_TOKEN` nearest stream tokens are found; a block earns the similarity of its
    best token above that of the farthest hit. Sums over question tokens rank the blocks.

    Source: ColBERT (arXiv:2004.12832), MaxSim; here between a language model's own pre-RoPE keys, centred per layer, so
    no second model is needed.

    Args:
        index: an index over `[num_parts * part_dim]` rows.
        mean: [num_parts, part_dim] float32: mean key per compared layer, removed before directions are compared.
    """

    def __init__(self, index: SummaryIndex, mean: Tensor) -> None:
        self._index = index
        self._mean = mean
        self._block_of_row: list[Tensor] = []

    def add(self, blocks: Iterable[tuple[int, Tensor]]) -> None:
        """Add blocks: (number, keys `[num_tokens, num_parts, part_dim]` float32), in one call to the index."""
        rows = []
        for block, keys in blocks:
            rows.append(self._directions(keys))
            self._block_of_row.append(torch.full((keys.shape[0],), block, dtype=torch.int32))
        if rows:
            self._index.add(torch.cat(rows))

    def rank(self, question: Tensor, num_blocks: int) -> Ranking:
        """Rank the blocks for a question.

        Args:
            question: [num_tokens, num_parts, part_dim] float32 keys of the question's tokens.
            num_blocks: blocks of the stream; blocks never added rank last with score 0.
        """
        scores = torch.zeros(num_blocks)
        if self._index.num_rows and question.shape[0]:
            similarity, rows = self._index.search(self._directions(question), HITS_PER_TOKEN)
            above = similarity - similarity[:, -1:]
            blocks = torch.cat(self._block_of_row)[rows].long()
            best = torch.zeros(question.shape[0], num_blocks)
            scores = best.scatter_reduce_(1, blocks, above, "amax").sum(dim=0)
        return Ranking.of(scores)

    def _directions(self, keys: Tensor) -> Tensor:
        return torch.nn.functional.normalize(keys - self._mean, dim=-1).flatten(1)
