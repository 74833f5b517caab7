# SPDX-License-Identifier: Apache-2.0
"""The words of a stream: directions in the first compared layer that tokens share, learnt as they come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError
from kvstore.retrieval.index.lasting import lasting
from kvstore.retrieval.late.rows import TokenRows

MAX_WORDS = 32768
_ALIKE = 0.8
_BATCH_ROWS = 2048
_NUM_PIVOTS = 256
_ROW_PIVOTS = 4


class Vocabulary:
    """Words: a token's row is of the word it is most like.

    In an early layer the keys of one token, wherever it stands, point the same way, so the rows of a stream fall into
    few and narrow bundles. A row that is unlike all words so far becomes one itself: there is nothing to train, new
    words are found wherever in the stream they turn up, and the same rows always make the same words. How many there
    are grows as a text's vocabulary does, much more slowly than the text; at `MAX_WORDS` it ends, and rows are given to
    the nearest word. Not thread-safe.

    Source: centroids of token embeddings as in PLAID (arXiv:2205.09707), found by leader clustering.

    Args:
        dim: elements of the first compared layer's part of a row.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._codes = lasting((MAX_WORDS, dim), torch.int8)  # takes memory only as words come
        self._scales = lasting((MAX_WORDS,), torch.float32)
        self._pivot_of = torch.zeros(MAX_WORDS, dtype=torch.int64)
        self._num_sorted = 0
        self.num_words = 0

    def scores(self, directions: Tensor) -> Tensor:
        """How alike `[num_rows, dim]` float32 are to all words: `[num_rows, num_words]` float32."""
        words = TokenRows(self._codes[: self.num_words], self._scales[: self.num_words])
        return words.products(directions)

    def words_from(self, first: int) -> TokenRows:
        """The words from a number on."""
        return TokenRows(self._codes[first : self.num_words].clone(), self._scales[first : self.num_words].clone())

    def extend(self, words: TokenRows) -> None:
        """Take in words that `words_from` gave.

        Raises:
            CorruptRecordError: more than there may be.
        """
        if words.num_rows > MAX_WORDS - self.num_words:
            raise CorruptRecordError(f"{self.num_words + words.num_rows} words; there are at most {MAX_WORDS}")
        end = self.num_words + words.num_rows
        self._codes[self.num_words : end] = words.codes
        self._scales[self.num_words : end] = words.scales
        self.num_words = end

    def cut(self, num_words: int) -> None:
        """Have as many words, at most `MAX_WORDS`: later ones are forgotten, and missing ones are like nothing.

        A piece that had to be made again may have made other words than at first. Later pieces keep their numbers, and
        the words that they made; where they hold a word that this piece had made at first, that is not found.
        """
        self._scales[min(num_words, self.num_words) :] = 0
        self._num_sorted = min(self._num_sorted, num_words)
        self.num_words = num_words

    def assign(self, rows: TokenRows) -> Tensor:
        """Give each row its word, making new words where none is like it: `[num_rows]` int64."""
        directions = torch.nn.functional.normalize(rows.decoded(self._dim), dim=1)
        # A key that is the mean has no direction, and would be unlike itself: all of them are one word.
        directions[~directions.any(dim=1), 0] = 1
        likeness, words = self._nearest(directions)
        first = self.num_words
        for some in (likeness < _ALIKE).nonzero()[:, 0].split(_BATCH_ROWS):
            words[some] = self._learn(directions[some], likeness[some], words[some], first)
        return words

    def _nearest(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest word of each row, and how near it is.

        With many words only those are looked at that share a pivot with the row: what is near each other is near the
        same pivots. A word that is missed so is made twice, which costs its room and nothing else.
        """
        nearest = torch.full((directions.shape[0],), -1.0)
        words = torch.zeros(directions.shape[0], dtype=torch.int64)
        if self.num_words <= _NUM_PIVOTS * _ROW_PIVOTS:
            self._compare(directions, torch.arange(directions.shape[0]), torch.arange(self.num_words), nearest, words)
            return nearest, words
        pivots = self._pick(torch.arange(_NUM_PIVOTS))
        for first in range(self._num_sorted, self.num_words, _BATCH_ROWS):
            some = torch.arange(first, min(first + _BATCH_ROWS, self.num_words))
            self._pivot_of[some] = (self._pick(some) @ pivots.T).argmax(dim=1)
        self._num_sorted = self.num_words
        members = _members(self._pivot_of[: self.num_words])
        near = (directions @ pivots.T).topk(_ROW_PIVOTS, dim=1).indices
        for of_pivot, places in zip(members, _members(near.flatten()), strict=True):
            self._compare(directions, places // _ROW_PIVOTS, of_pivot, nearest, words)
        return nearest, words

    def _compare(self, directions: Tensor, rows: Tensor, words: Tensor, nearest: Tensor, found: Tensor) -> None:
        """Note for some rows which of some words is nearer than the nearest so far."""
        for some in words.split(_BATCH_ROWS):
            if some.numel() and rows.numel():
                likeness, best = (directions[rows] @ self._pick(some).T).max(dim=1)
                found[rows] = torch.where(likeness > nearest[rows], some[best], found[rows])
                nearest[rows] = torch.maximum(likeness, nearest[rows])

    def _learn(self, directions: Tensor, nearest: Tensor, words: Tensor, first: int) -> Tensor:
        """Words of rows that are unlike all words before number `first`: of later ones, or new ones."""
        rows = torch.arange(directions.shape[0])
        self._compare(directions, rows, torch.arange(first, self.num_words), nearest, words)
        unlike = (nearest < _ALIKE).nonzero()[:, 0]
        if unlike.numel() and self.num_words < MAX_WORDS:
            far, made = directions[unlike], self.num_words
            self.extend(TokenRows.of(far[_leaders(far @ far.T >= _ALIKE)[: MAX_WORDS - made]]))
            self._compare(directions, unlike, torch.arange(made, self.num_words), nearest, words)
        return words

    def _pick(self, words: Tensor) -> Tensor:
        """Some words, decoded: `[num, dim]` float32."""
        return self._codes[words].float() * self._scales[words, None]


def _leaders(is_alike: Tensor) -> Tensor:
    """Of rows, `[num, num]` bool, those that are not alike to one taken before: `[any]` int64."""
    left = torch.ones(is_alike.shape[0], dtype=torch.bool)
    leaders = []
    for number in range(is_alike.shape[0]):
        if left[number]:
            leaders.append(number)
            left &= ~is_alike[number]
    return torch.tensor(leaders)


def _members(groups: Tensor) -> Sequence[Tensor]:
    """Which elements of `[any]` int64 are of each of the pivots' groups."""
    sizes = torch.bincount(groups, minlength=_NUM_PIVOTS)
    found: Sequence[Tensor] = groups.argsort(stable=True).split(sizes.tolist())
    return found
