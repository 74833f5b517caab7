# SPDX-License-Identifier: Apache-2.0
"""The words of each block, two bytes each, and what blocks earn by them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.native import score_postings
from kvstore.retrieval.index.lasting import lasting

Words = npt.NDArray[np.uint16]

_ALL_WORDS = 1 << 16
_RUN_WORDS = 1 << 19


@dataclass(slots=True)
class _Run:
    """Words of consecutive blocks, in memory of a fixed size, and the number of each block's."""

    room: Words
    num_words: int = 0
    sizes: list[npt.NDArray[np.uint32]] = field(default_factory=list)


class Postings:
    """Words of blocks, in runs that are never copied. Not thread-safe."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def add(self, words: Words, sizes: Tensor) -> None:
        """Add blocks: the words of one after the other, and how many each has, `[num_blocks]` int64."""
        last = self._runs[-1] if self._runs else None
        if last is None or words.shape[0] > last.room.shape[0] - last.num_words:
            # Pages that no word is written to take no memory.
            room = lasting((max(words.shape[0], _RUN_WORDS),), torch.int16).numpy().view(np.uint16)
            last = _Run(room)
            self._runs.append(last)
        last.room[last.num_words : last.num_words + words.shape[0]] = words
        last.num_words += words.shape[0]
        last.sizes.append(sizes.numpy().astype(np.uint32))

    def earned(self, gains: Tensor) -> Tensor:
        """What each block earns: over its words, the largest gain of each token, summed up.

        Args:
            gains: [num_tokens, num_words] float32; what is not above 0 is none.

        Returns:
            [num_blocks] float32.
        """
        word, token = gains.T.gt(0).nonzero(as_tuple=True)
        earning, counts = word.unique_consecutive(return_counts=True)
        places = np.zeros(_ALL_WORDS, dtype=np.uint16)
        places[earning.numpy()] = np.arange(1, earning.shape[0] + 1)
        starts = np.concatenate([[0], counts.cumsum(0).numpy()]).astype(np.uint32)
        found = gains[token, word].numpy()
        words = (places.data, starts.data, token.numpy().astype(np.uint32).data, found.data)
        totals = []
        for run in self._runs:
            run.sizes[:] = [np.concatenate(run.sizes)]
            total = np.empty(run.sizes[0].shape[0], dtype=np.float32)
            score_postings(run.room[: run.num_words].data, run.sizes[0].data, words, gains.shape[0], total.data)
            totals.append(torch.from_numpy(total))
        return torch.cat(totals)
