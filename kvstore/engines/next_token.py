# SPDX-License-Identifier: Apache-2.0
"""The last step of a model: hidden states to next-token distributions, in float32 and a part of the words at a time.

A table of words in float32 is the largest tensor of a small model; distributions of a few hundred tokens are as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvstore.engines.anatomy import decoder_of
from kvstore.errors import CalibrationError

PIECE_TOKENS = 64
"""Tokens whose distributions are made together."""

_PIECE_WORDS = 4096
_PROBED_TOKENS = 8
_TOLERANCE = 0.01
"""Of the largest logit: several roundings of bfloat16."""


class NextToken:
    """Next-token distributions of one model, without a widened copy of its table of words.

    Args:
        model: a transformers model that can be attached; it reads a few tokens.

    Raises:
        CalibrationError: the model makes its logits in another way than multiplying those of its table by a number.
    """

    def __init__(self, model: Any) -> None:
        table = model.get_output_embeddings()
        self._weight: Tensor = table.weight.detach()
        self._bias: Tensor | None = getattr(table, "bias", None)
        self._factor = self._found_factor(model)

    def logs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities, [count, vocabulary] float32, of the token after each.

        Args:
            hidden: [count, hidden_size], what the decoder gives for the tokens.
        """
        logits = self._of_table(hidden)
        logits *= self._factor
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
        return found * self._factor

    def _of_table(self, hidden: Tensor) -> Tensor:
        """[count, vocabulary] float32, as the table gives them."""
        wide = hidden.float()
        logits = wide.new_empty(hidden.shape[0], self._weight.shape[0])
        for words, weight in self._pieces():
            torch.mm(wide, weight.T, out=logits[:, words])
        if self._bias is not None:
            logits += self._bias.detach().float()
        return logits

    def _found_factor(self, model: Any) -> float:
        """What the model multiplies logits by: families scale them up or down, under many names."""
        ids = torch.linspace(0, self._weight.shape[0] - 1, _PROBED_TOKENS, device=model.device).long()[None]
        hidden: list[Tensor] = []
        hook = decoder_of(model).register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state[0]))
        try:
            with torch.inference_mode(False), torch.no_grad():
                said = model(input_ids=ids, use_cache=False).logits[0].float()
                plain = self._of_table(hidden[0])
        finally:
            hook.remove()
        factor = (said * plain).sum() / plain.square().sum()
        if not (said - factor * plain).abs().max() <= _TOLERANCE * said.abs().max():
            raise CalibrationError(
                f"{type(model).__name__}: its logits are no multiple of what its table of words gives"
            )
        return float(factor)

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, self._weight.shape[0], _PIECE_WORDS):
            words = slice(first, min(first + _PIECE_WORDS, self._weight.shape[0]))
            yield words, self._weight[words].float()
