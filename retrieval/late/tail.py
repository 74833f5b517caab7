# SPDX-License-Identifier: Apache-2.0
"""The last blocks of a late-interaction index, in memory until they are a piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.retrieval.late.rows import TokenRows, directions_of

_MEAN_BLOCKS = 64


class Tail:
    """Coded rows of the last blocks, and the mean that all directions of a stream are taken from.

    The mean is that of the first 64 blocks, or of as many as make a piece, and is fixed then; before, it is that of all
    blocks there are. So it depends on the stream alone, not on when somebody looked. Not thread-safe.

    Args:
        num_parts: compared layers.
        part_dim: elements of one layer's part of a row.
        piece_tokens: see `LateInteraction`.
    """

    def __init__(self, num_parts: int, part_dim: int, piece_tokens: int) -> None:
        self._shape = (num_parts, part_dim)
        self._piece_tokens = piece_tokens
        self._rows: dict[int, TokenRows] = {}
        self._young: list[tuple[int, int, Tensor | None]] = []
        self._fixed: Tensor | None = None
        self.end_block = 0
        """The block behind the last one that was added."""

    @property
    def mean(self) -> Tensor:
        """[num_parts, part_dim] float32: mean key; zeros while there are no rows."""
        return self._fixed if self._fixed is not None else self._mean_so_far()

    def fix(self, mean: Tensor) -> None:
        """Take the mean that a stored piece names, unless there is one already."""
        if self._fixed is None:
            self._fixed = mean
            self._rows = {block: self._coded(keys, mean) for block, _, keys in self._young}
            self._young = []

    def add(self, block: int, num_tokens: int, keys: Tensor | None) -> None:
        """Add the next block.

        Args:
            block: its number.
            num_tokens: of the block, even if it is lost.
            keys: [num_tokens, num_parts, part_dim] float32; None for a block that could not be read.
        """
        self.end_block = block + 1
        if self._fixed is not None:
            self._rows[block] = self._coded(keys, self._fixed)
            return
        self._young.append((block, num_tokens, keys))
        if len(self._young) == _MEAN_BLOCKS or sum(tokens for _, tokens, _ in self._young) >= self._piece_tokens:
            self.fix(self._mean_so_far())

    def take_until(self, end: int) -> list[TokenRows]:
        """Remove the blocks before a number, and return their rows; none for a block that was lost."""
        self.end_block = max(self.end_block, end)
        return [self._rows.pop(block) for block in sorted(self._rows) if block < end]

    def rows(self) -> Sequence[tuple[int, TokenRows]]:
        """The blocks and their rows, ascending."""
        if self._fixed is not None:
            return list(self._rows.items())
        mean = self._mean_so_far()
        return [(block, self._coded(keys, mean)) for block, _, keys in self._young]

    def _mean_so_far(self) -> Tensor:
        keys = [each for _, _, each in self._young if each is not None]
        return torch.cat(keys).mean(dim=0) if keys else torch.zeros(self._shape)

    def _coded(self, keys: Tensor | None, mean: Tensor) -> TokenRows:
        return TokenRows.of(directions_of(torch.empty(0, *self._shape) if keys is None else keys, mean))
