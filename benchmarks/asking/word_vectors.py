# SPDX-License-Identifier: Apache-2.0
"""A retriever that a user could bring: the words of a transcript and of a question, weighed by how rare they are."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from asking.truth import Line
from demo_scoring import is_right_moment
from kvstore.retrieval.external import ExternalVectors
from kvstore.retrieval.fusion import ExtraScores
from kvstore.store import Entry

DIM = 4096
_WORD = re.compile(r"\w+")


class WordVectors:
    """Vectors of the lines of a transcript, given to the blocks of the same time: TF-IDF over hashed words.

    It knows nothing of the model. All blocks of a screen get the vectors of all its paragraphs: a transcript has times,
    not tokens.

    Args:
        lines: the transcript.
        entries: the stream's blocks.
    """

    def __init__(self, lines: Sequence[Line], entries: Sequence[Entry]) -> None:
        counts = torch.stack([_counts(line.text) for line in lines])
        num_lines = (counts > 0).sum(dim=0)
        self._rarity = (len(lines) / num_lines.clamp_min(1)).log() * (num_lines > 0)
        self._num_blocks = len(entries)
        self._vectors = ExternalVectors(DIM)
        for line, vector in zip(lines, self._weighed(counts), strict=True):
            blocks = [
                entry.index
                for entry in entries
                if entry.group >= 0 and is_right_moment((entry.start_s, entry.end_s), [(line.start_s, line.end_s)])
            ]
            if blocks and vector.any():
                self._vectors.add(torch.tensor(blocks), vector.expand(len(blocks), -1))

    def scores(self, question: str) -> list[ExtraScores]:
        """What to hand a question as `external`; nothing where no word of it is in the transcript."""
        vector = self._weighed(_counts(question))
        return [ExtraScores(self._vectors.scores(vector, self._num_blocks))] if vector.any() else []

    def _weighed(self, counts: Tensor) -> Tensor:
        return counts.log1p() * self._rarity


def _counts(text: str) -> Tensor:
    """How often each hashed word occurs: `[DIM]` float32."""
    counts = torch.zeros(DIM)
    for word, count in Counter(_WORD.findall(text.casefold())).items():
        counts[zlib.crc32(word.encode()) % DIM] += count
    return counts
