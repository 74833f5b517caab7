# SPDX-License-Identifier: Apache-2.0
"""How much a model minds errors in its keys and values, channel by channel, and the steps that follow from it.

The measure is the diagonal of the Fisher information: the mean square of the gradient of the log-likelihood of tokens
drawn from the model itself. An error of variance v in an element moves the next-token distribution by a KL divergence
of half its Fisher information times v, so steps that weigh channels by it cost least at a given rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kvstore.calibration import SINK_TOKENS
from kvstore.engines.next_token import PIECE_TOKENS, NextToken
from kvstore.engines.past import Run, frozen, recomputed, states_behind

_DRAWS = 2
_CHANNEL_POWER = -0.5
_HEAD_POWER = -0.25
_MAX_OCTAVES = 1.0
"""Of a head's weight: what few tokens say of a head must not make its errors large."""
_MAX_LOG_STEP = 24
_FLOOR = 1e-4
"""Of the mean: a channel without any effect on these tokens may have one on others."""


class Sensitivity:
    """Collects how much a model minds errors, a run at a time; only sums are kept.

    Args:
        model: a transformers model that can be attached; it is left as it was.
        generator: on the CPU; draws labels.
    """

    def __init__(self, model: Any, generator: torch.Generator) -> None:
        self._model = model
        self._next_token = NextToken(model)
        self._generator = generator
        self._keys, self._values, self._variance = (torch.zeros(0, dtype=torch.float64) for _ in range(3))
        self._value_dim = 0

    def add(self, run: Run) -> None:
        """Add a run's Fisher information: of keys as they are, of values relative to the rms of their row."""
        layers, heads, _, key_dim = run.keys.shape
        with frozen(self._model), recomputed(self._model):
            if self._keys.numel() == 0:
                self._keys = torch.zeros(layers, heads, key_dim, dtype=torch.float64)
                self._values, self._variance = (torch.zeros(layers, heads, dtype=torch.float64) for _ in range(2))
                self._value_dim = run.values.shape[3]
            self._variance += _head_variance(run.keys)
            # Leaves of their own: what was made in inference mode cannot take part in gradients.
            past = run.keys.clone().requires_grad_(True), run.values.clone().requires_grad_(True)
            with torch.enable_grad():
                states = states_behind(self._model, *past, run.continuation)
            for draw in range(_DRAWS):
                keys, values = torch.autograd.grad(
                    states, past, self._drawn_gradient(states.detach()), retain_graph=draw < _DRAWS - 1
                )
                for layer in range(keys.shape[0]):  # one at a time: float64 of a whole run is large
                    rows = run.values[layer, :, SINK_TOKENS:].double().square().mean(2, keepdim=True)
                    self._keys[layer] += keys[layer, :, SINK_TOKENS:].double().square().sum(1).cpu()
                    self._values[layer] += (values[layer, :, SINK_TOKENS:].double().square() * rows).sum((1, 2)).cpu()

    def log_steps(self) -> tuple[Tensor, Tensor]:
        """How coarse each channel may be; see `Moments.planes`. At least one run was added.

        Returns:
            For keys and for values, [num_layers, kv_heads, dim] int8, eighths of an octave. Their mean is 0 over the
            channels of a head and over heads, so they hardly change the rate.
        """
        floored = (self._keys + _FLOOR * self._keys.mean(2, keepdim=True)).clamp_min(1e-300)
        channels = _centred(_CHANNEL_POWER * floored.log2(), (2,))
        key_heads = _head_octaves(self._keys.mean(2) * self._variance)
        value_heads = _head_octaves(self._values)
        return (
            _as_log_step(channels + key_heads[..., None]),
            _as_log_step(value_heads[..., None].expand(*self._values.shape, self._value_dim)),
        )

    def _drawn_gradient(self, states: Tensor) -> Tensor:
        """Of the log-likelihood of labels drawn from the model, by its hidden states."""
        pieces = []
        for piece in states.split(PIECE_TOKENS):
            logs = self._next_token.logs(piece)
            labels = torch.multinomial(logs.exp().cpu(), 1, generator=self._generator).to(logs.device)
            pieces.append(self._next_token.gradient(logs, labels[:, 0]))
        return torch.cat(pieces).to(states.dtype)


def log_steps(model: Any, runs: Iterable[Run], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Measure how coarse each channel may be by all of these runs; see `Sensitivity`."""
    found = Sensitivity(model, generator)
    for run in runs:
        found.add(run)
    return found.log_steps()


def _head_variance(keys: Tensor) -> Tensor:
    """[num_layers, kv_heads] mean square of a head's keys, their mean removed."""
    return keys[:, :, SINK_TOKENS:].float().var(2, correction=0).mean(2).double().cpu()


def _head_octaves(information: Tensor) -> Tensor:
    """Octaves by which a head's steps differ from the mean, from its information relative to its own size."""
    floored = (information + _FLOOR * information.mean()).clamp_min(1e-300)
    return _centred(_centred(_HEAD_POWER * floored.log2(), (0, 1)).clamp(-_MAX_OCTAVES, _MAX_OCTAVES), (0, 1))


def _centred(octaves: Tensor, dims: tuple[int, ...]) -> Tensor:
    return octaves - octaves.mean(dims, keepdim=True)


def _as_log_step(octaves: Tensor) -> Tensor:
    return (8 * octaves).round().clamp(-_MAX_LOG_STEP, _MAX_LOG_STEP).to(torch.int8).contiguous()
