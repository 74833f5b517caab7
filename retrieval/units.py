# SPDX-License-Identifier: Apache-2.0
"""Units: what is scored and selected. A page is a run of tokens; a cluster is any set of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvstore.retrieval.tokens import LayerTokens


@dataclass(frozen=True, slots=True)
class Units:
    """Some of a stream's tokens, cut into units; each token is in exactly one.

    Args:
        tokens: [num_tokens] int64: numbers of the tokens in the stream, unit after unit, ascending inside each.
        starts: [num_units + 1] int64, strictly ascending from 0: unit `i` holds `tokens[starts[i]:starts[i + 1]]`.
    """

    tokens: Tensor
    starts: Tensor

    @staticmethod
    def runs(first: int, sizes: Sequence[int]) -> Units:
        """Units of `sizes` tokens each, one behind the other from token `first` on."""
        starts = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
        return Units(torch.arange(first, first + int(starts[-1])), starts)

    @property
    def num_units(self) -> int:
        """How many units there are."""
        return self.starts.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """How many tokens they hold together."""
        return self.tokens.shape[0]

    @property
    def sizes(self) -> Tensor:
        """Tokens of each unit: `[num_units]` int64."""
        return self.starts.diff()

    def unit_of_place(self) -> Tensor:
        """The unit of each element of `tokens`: `[num_tokens]` int64."""
        return torch.repeat_interleave(torch.arange(self.num_units), self.sizes)


class Segmenter(Protocol):
    """Says where units end."""

    def cut(self, tokens: LayerTokens, *, is_end: bool) -> Sequence[Units]:
        """Cut the first tokens of a run.

        Args:
            tokens: those that are in no unit yet, in order.
            is_end: no more are to come: everything is to be cut.

        Returns:
            One `Units` for all KV heads alike, or one for each; all cover the same tokens, which are the first ones of
            `tokens`. What they leave is offered again together with the tokens that follow.
        """
