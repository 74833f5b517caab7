# SPDX-License-Identifier: Apache-2.0
"""The gate: how far a lossy profile moves a model's next-token distribution, on tokens it was not fitted to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvstore.codec import Codec
from kvstore.engines.past import Run, continue_run, widened
from kvstore.layout import BlockLayout


class Judge:
    """Compares what a model says behind coded keys and values with what it says behind exact ones.

    Args:
        model: a transformers model that can be attached.
        run: tokens with a continuation; the blocks begin at the first one, as those of a stream do.
        layout: how the run is cut into blocks.
    """

    def __init__(self, model: Any, run: Run, layout: BlockLayout) -> None:
        self._model = model
        self._run = run
        self._layout = layout
        self._exact = self._logs(run.keys, run.values)

    def divergence(self, codec: Codec) -> float:
        """Mean KL divergence over the continuation, nats a token, of exact against coded keys and values."""
        logs = self._logs(*self._coded(codec))
        return float((self._exact.exp() * (self._exact - logs)).sum(-1).mean())

    def _logs(self, keys: Tensor, values: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), widened(self._model):
            return continue_run(self._model, keys.float(), values.float(), self._run.continuation)

    def _coded(self, codec: Codec) -> tuple[Tensor, Tensor]:
        """The run's keys and values after encoding and decoding."""
        layout = self._layout
        keys, values = self._run.keys.clone(), self._run.values.clone()
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
