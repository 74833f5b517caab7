# SPDX-License-Identifier: Apache-2.0
"""The last step of a model: hidden states to next-token distributions, in float32 and a part of the words at a time.

A table of words in float32 is the largest tensor of a small model; distributions of a few hundred tokens are as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECE_TOKENS = 64
"""Tokens whose distributions are made together."""

_PIECE_WORDS = 4096


class NextToken:
    """Next-token distributions of one model, without a widened copy of its table of words.

    Args:
        model: a transformers model that can be attached.
    """

    def __init__(self, model: Any) -> None:
        table = model.get_output_embeddings()
        self._weight: Tensor = table.weight.detach()
        self._bias: Tensor | None = getattr(table, "bias", None)
        # Granite divides its logits.
        self._divisor = float(getattr(model.config.get_text_config(decoder=True), "logits_scaling", 1.0))

    def logs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities, [count, vocabulary] float32, of the token after each.

        Args:
            hidden: [count, hidden_size], what the decoder gives for the tokens.
        """
        wide = hidden.float()
        logits = wide.new_empty(hidden.shape[0], self._weight.shape[0])
        for words, weight in self._pieces():
            torch.mm(wide, weight.T, out=logits[:, words])
        if self._bias is not None:
            logits += self._bias.detach().float()
        logits /= self._divisor
        logits -= logits.logsumexp(-1, keepdim=True)
        return logits

    def gradient(self, logs: Tensor, labels: Tensor) -> Tensor:
        """How the log-probabilities of labels change with the hidden states, [count, hidden_size] float32.

        Args:
            logs: from `logs`.
            labels: [count] int64, one for each token.
        """
        found = self._weight[labels].float()
        for words, weight in self._pieces():
            found -= logs[:, words].exp() @ weight
        return found / self._divisor

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, self._weight.shape[0], _PIECE_WORDS):
            words = slice(first, min(first + _PIECE_WORDS, self._weight.shape[0]))
            yield words, self._weight[words].float()
