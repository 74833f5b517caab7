# SPDX-License-Identifier: Apache-2.0
"""Late interaction: a block is scored by how closely its tokens' keys echo the question's keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.retrieval.index.flat import SummaryIndex
from kvstore.retrieval.selection import Ranking


@dataclass(frozen=True, slots=True)
class LateInteraction:
    """One ranking of blocks for all layers, by a pass over the question of its own.

    Args:
        depths: of the layers whose keys are compared, as fractions of all: one near the words, one that has seen the
            sentence.
        hits_per_token: nearest tokens taken per question token. The last of them is the floor that weighs the others: a
            word that stands in every block has as many perfect hits and so adds nothing, as an inverse document
            frequency would have it.
        piece_tokens: tokens of the stream, whole blocks, after which their part of the index is stored beside it.
        num_candidates: stored blocks of which all rows are read for a question.
    """

    depths: tuple[float, ...] = (1 / 30, 9 / 30)
    hits_per_token: int = 256
    piece_tokens: int = 16384
    num_candidates: int = 256

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers whose keys are kept and compared, ascending, without repeats."""
        return tuple(sorted({min(round(depth * num_layers), num_layers - 1) for depth in self.depths}))


def maxsim(similarity: Tensor, blocks: Tensor, weights: Tensor, hits: int) -> tuple[Tensor, Tensor]:
    """Score blocks by their tokens' best matches with each question token.

    For each question token the `hits` nearest stream tokens count; a block earns the similarity of its best token above
    that of the farthest hit. The sum over question tokens is its score.

    Source: ColBERT (arXiv:2004.12832), MaxSim; here between a language model's own pre-RoPE keys, centred per layer, so
    no second model is needed.

    Args:
        similarity: [num_tokens, num_rows] float32: of question tokens with stream tokens.
        blocks: [num_rows] int64: each row's block.
        weights: [num_rows] float32: how many of the stream's tokens a row stands for, itself included.
        hits: nearest tokens per question token.

    Returns:
        (blocks, scores): `[num_blocks]` int64 ascending and float32, of the blocks that have rows.
    """
    numbers, places = blocks.unique(return_inverse=True)
    if similarity.numel() == 0:
        return numbers, torch.zeros(numbers.shape[0])
    # A row stands for one token at least, so the floor is among the nearest `hits` rows.
    nearest = similarity.topk(min(hits, similarity.shape[1]), dim=1)
    is_above = weights[nearest.indices].cumsum(dim=1) < hits
    last = is_above.sum(dim=1, keepdim=True).clamp_max(nearest.values.shape[1] - 1)
    above = (similarity - nearest.values.gather(1, last)).clamp_min(0)
    best = torch.zeros(similarity.shape[0], numbers.shape[0])
    best.scatter_reduce_(1, places.expand_as(above), above, "amax")
    return numbers, best.sum(dim=0)


class MaxSimScorer:
    """Scores blocks as `maxsim` does, over all rows there are: what benchmarks hold the index of a stream against.

    Args:
        index: an index over `[num_parts * part_dim]` rows.
        mean: [num_parts, part_dim] float32: mean key per compared layer, removed before directions are compared.
        hits_per_token: see `LateInteraction`.
    """

    def __init__(self, index: SummaryIndex, mean: Tensor, hits_per_token: int) -> None:
        self._index = index
        self._hits_per_token = hits_per_token
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
            similarity, rows = self._index.search(self._directions(question), self._hits_per_token)
            above = similarity - similarity[:, -1:]
            blocks = torch.cat(self._block_of_row)[rows].long()
            best = torch.zeros(question.shape[0], num_blocks)
            scores = best.scatter_reduce_(1, blocks, above, "amax").sum(dim=0)
        return Ranking.of(scores)

    def _directions(self, keys: Tensor) -> Tensor:
        return torch.nn.functional.normalize(keys - self._mean, dim=-1).flatten(1)
