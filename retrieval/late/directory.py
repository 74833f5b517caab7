# SPDX-License-Identifier: Apache-2.0
"""Which words stand in which blocks: what a late-interaction index keeps in memory of blocks that it has sealed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError
from kvstore.retrieval.late.piece import PieceHead
from kvstore.retrieval.late.postings import Postings, Words
from kvstore.retrieval.late.words import MAX_WORDS, Vocabulary

_RARE = 32
"""A word that stands in fewer than one of so many blocks tells something."""

_MANY_BLOCKS = 1 << 13
"""From as many on, the words that tell nothing are not kept."""


class Directory:
    """The words of a stream and the blocks that hold them; finds the blocks worth a closer look. Not thread-safe.

    Two bytes a word and block, about one a token, and the words themselves.

    Args:
        part_dim: elements of the first compared layer's part of a row.
    """

    def __init__(self, part_dim: int) -> None:
        self._part_dim = part_dim
        self.vocabulary = Vocabulary(part_dim)
        self._postings = Postings()
        self._rows = [torch.empty(0, dtype=torch.int32)]
        self._first_block = 0
        self._num_blocks = 0
        self._counts = torch.zeros(MAX_WORDS, dtype=torch.int64)
        self.rows_of_word = torch.zeros(MAX_WORDS, dtype=torch.int64)
        """Rows of sealed blocks, of each word."""

    @property
    def end_block(self) -> int:
        """The block behind the last sealed one."""
        return self._first_block + self._num_blocks

    def add(self, head: PieceHead, *, is_stored: bool) -> None:
        """Take in the next piece.

        Args:
            head: what is kept of it.
            is_stored: it was read; else `seal` has just made it with this vocabulary, which has its words.

        Raises:
            CorruptRecordError: it does not follow the last one, or has too many words.
        """
        if self._num_blocks and head.first_block != self.end_block:
            raise CorruptRecordError(
                f"a piece of an index begins at block {head.first_block}, where block {self.end_block} is next"
            )
        if is_stored:
            self.vocabulary.cut(head.words_before)
            self.vocabulary.extend(head.new_words)
        if self._num_blocks == 0:
            self._first_block = head.first_block
        self._rows.append(head.rows_of_block.int())
        self._num_blocks += head.rows_of_block.shape[0]
        self._counts += torch.from_numpy(np.bincount(head.postings, minlength=MAX_WORDS))
        self._postings.add(*self._telling(head))
        self.rows_of_word[head.counted] += head.counts

    def _telling(self, head: PieceHead) -> tuple[Words, Tensor]:
        """The words of a piece's blocks that will earn something, and how many each has.

        One that stands in more than one of `_RARE` blocks is never above the floor: in a long stream, those that stand
        in twice as many are left out. One that turns rare long after is not found where it was common.
        """
        sizes = head.postings_of_block
        if self._num_blocks < _MANY_BLOCKS:
            return head.postings, sizes
        is_kept = (self._counts < 2 * self._num_blocks // _RARE).numpy()[head.postings]
        before = np.concatenate([[0], is_kept.cumsum()])
        ends = sizes.cumsum(0).numpy()
        return head.postings[is_kept], torch.from_numpy(before[ends] - before[ends - sizes.numpy()])

    def num_rows(self, block: int) -> int:
        """Rows of a sealed block."""
        return int(_joined(self._rows)[block - self._first_block])

    def candidates(self, question: Tensor, num_hits: int, num_wanted: int, end: int) -> list[int]:
        """The sealed blocks that promise most, ascending.

        A block earns, per token of the question, the likeness of its best word above that of the word with which as
        many as `num_hits` blocks have been met, times that word's inverse document frequency: candidates by centroids
        alone, as in PLAID (arXiv:2205.09707). In a long stream each word stands in more blocks than that, and what
        tells is which of them meet: there a share of all blocks are hits.

        Args:
            question: [num_tokens, part_dim] float32 directions in the first compared layer.
            num_hits: see `LateInteraction.hits_per_token`.
            num_wanted: how many.
            end: blocks from this one on are none of the question's.
        """
        first, end = self._first_block, min(end, self.end_block)
        if end - first <= num_wanted:
            return list(range(first, end))
        likeness = self.vocabulary.scores(question)
        best = likeness.topk(min(num_hits, likeness.shape[1]), dim=1)
        num_hits = max(num_hits, (end - first) // _RARE)
        is_near = self._counts[best.indices].cumsum(dim=1) < num_hits
        floor = best.values.gather(1, is_near.sum(dim=1).clamp_max(best.values.shape[1] - 1)[:, None])
        above = likeness.sub_(floor).clamp_min_(0)
        above *= (self._num_blocks / self._counts[: above.shape[1]].clamp_min(1)).log().clamp_min_(0)
        total = self._postings.earned(above)
        total[end - first :] = 0
        order = total.topk(min(num_wanted, int((total > 0).sum()))).indices
        return sorted((order + first).tolist())


def _joined(parts: list[Tensor]) -> Tensor:
    """All parts as one, which then takes their place."""
    if len(parts) > 1:
        parts[:] = [torch.cat(parts)]
    return parts[0]
