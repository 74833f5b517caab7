# SPDX-License-Identifier: Apache-2.0
"""The gate: how far a lossy profile moves a model's next-token distribution, on tokens it was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvstore.codec import Codec
from kvstore.engines.next_token import PIECE_TOKENS, NextToken
from kvstore.engines.past import Run, states_behind, widened
from kvstore.layout import BlockLayout


class Judge:
    """Compares what a model says behind coded keys and values with what it says behind exact ones.

    Args:
        model: a transformers model that can be attached.
        runs: tokens with continuations; the blocks begin at the first one, as those of a stream do.
        layout: how runs are cut into blocks.
    """

    def __init__(self, model: Any, runs: Sequence[Run], layout: BlockLayout) -> None:
        self._model = model
        self._next_token = NextToken(model)
        self._runs = runs
        self._layout = layout
        self._exact = [self._states(run.keys, run.values, run.continuation) for run in runs]

    def divergence(self, codec: Codec) -> float:
        """Mean KL divergence over the continuations, nats a token, of exact against coded keys and values."""
        lost = [
            self._divergence(exact, self._states(*self._coded(codec, run), run.continuation))
            for run, exact in zip(self._runs, self._exact, strict=True)
        ]
        return float(torch.cat(lost).mean())

    def _divergence(self, exact: Tensor, coded: Tensor) -> Tensor:
        """[count] KL divergences behind hidden states."""
        lost = []
        with torch.inference_mode():
            for pair in zip(exact.split(PIECE_TOKENS), coded.split(PIECE_TOKENS), strict=True):
                wanted, found = map(self._next_token.logs, pair)
                found.neg_().add_(wanted).mul_(wanted.exp_())  # in place: each is a row of all words for every token
                lost.append(found.sum(-1))
        return torch.cat(lost)

    def _states(self, keys: Tensor, values: Tensor, continuation: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), widened(self._model):
            return states_behind(self._model, keys, values, continuation)

    def _coded(self, codec: Codec, run: Run) -> tuple[Tensor, Tensor]:
        """A run's keys and values after encoding and decoding."""
        layout = self._layout
        keys, values = run.keys.clone(), run.values.clone()
        slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
        record = bytearray(codec.bound(layout.block_tokens))
        for first in range(0, keys.shape[2], layout.block_tokens):
            count = min(layout.block_tokens, keys.shape[2] - first)
            window = slice(first, first + count)
            layout.keys(slot)[:, :, :count] = keys[:, :, window].cpu()
            layout.values(slot)[:, :, :count] = values[:, :, window].cpu()
            nbytes = codec.encode(slot, count, first, record)
            codec.decode(memoryview(record)[:nbytes], slot, num_tokens=count)
            keys[:, :, window] = layout.keys(slot)[:, :, :count].to(keys.device)
            values[:, :, window] = layout.values(slot)[:, :, :count].to(values.device)
        return keys, values
