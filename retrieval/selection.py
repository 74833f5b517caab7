# SPDX-License-Identifier: Apache-2.0
"""Rankings of blocks, and how a token budget turns a ranking into a selection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.retrieval.fusion import ExtraScores, ReciprocalRank

_TURN_BLOCKS = 1024


@dataclass(frozen=True, slots=True)
class Ranking:
    """Blocks by score, best first.

    Args:
        blocks: [num_ranked] int64 block indices of the stream.
        scores: [num_ranked] float32; what a score means depends on the policy, larger is better.
    """

    blocks: Tensor
    scores: Tensor

    @staticmethod
    def of(scores: Tensor) -> Ranking:
        """Rank `scores` `[num_blocks]`; equal scores keep the older block first."""
        ordered = torch.sort(scores, descending=True, stable=True)
        return Ranking(ordered.indices, ordered.values)

    def fused(self, external: Sequence[ExtraScores], num_blocks: int) -> Ranking:
        """Fuse with other retrievers' scores of all blocks, `[num_blocks]` each, by reciprocal rank."""
        if not external:
            return self
        own = torch.full((num_blocks,), float("-inf"))
        own[self.blocks] = self.scores
        # The first list counts nothing and knows everything, so that no block is excluded.
        fusion = ReciprocalRank(weights=(0.0, 1.0, *(each.weight for each in external)))
        lists = [torch.zeros_like(own), own, *(each.scores.float().cpu() for each in external)]
        return Ranking.of(fusion.fuse([each[None] for each in lists])[0])

    def pairs(self) -> Iterator[tuple[int, float]]:
        """Yield (block, score), best first; who stops early does not pay for the rest."""
        for blocks, scores in zip(self.blocks.split(_TURN_BLOCKS), self.scores.split(_TURN_BLOCKS), strict=True):
            yield from zip(blocks.tolist(), scores.tolist(), strict=True)

    def before(self, num_blocks: int) -> Ranking:
        """Keep the blocks below `num_blocks`: what a question that started earlier may see."""
        kept = self.blocks < num_blocks
        return Ranking(self.blocks[kept], self.scores[kept])


def select(ranking: Ranking, num_tokens: Tensor, budget_tokens: int, excluded: frozenset[int]) -> list[int]:
    """Take blocks in order of score while they fit the budget.

    The best block is taken even when it alone exceeds the budget, so that a question never goes unanswered for want of
    room; a block that does not fit is passed over for a smaller one behind it.

    Args:
        ranking: candidates.
        num_tokens: [num_blocks] int64: tokens of every block of the stream.
        budget_tokens: most tokens to take; 0 takes none.
        excluded: blocks that are attended anyway (sinks, recent window).

    Returns:
        Block indices in time order.
    """
    chosen: list[int] = []
    left = budget_tokens
    for blocks in ranking.blocks.split(_TURN_BLOCKS):
        if left <= 0:
            break
        if chosen:  # what is too large by now is passed over at once: a stream may have a hundred thousand blocks
            blocks = blocks[num_tokens[blocks] <= left]
        for block, need in zip(blocks.tolist(), num_tokens[blocks].tolist(), strict=True):
            if left > 0 and block not in excluded and (need <= left or not chosen):
                chosen.append(block)
                left -= need
    return sorted(chosen)
