# SPDX-License-Identifier: Apache-2.0
"""Retention: what of a run of tokens is worth storing. It loses the rest for good."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from kvstore.retrieval.tokens import LayerTokens


class Retention(Protocol):
    """Chooses the tokens that stay, the same in all layers.

    `keeps_text` says whether text is kept before all tokens of frames.
    """

    keeps_text: ClassVar[bool]

    def keep(self, tokens: LayerTokens, budget_tokens: int) -> Tensor:
        """Choose tokens of a run.

        Args:
            tokens: the run, in the layer that is asked.
            budget_tokens: most tokens to keep, at least one.

        Returns:
            [num_kept] int64, ascending: places in the run.
        """
