# SPDX-License-Identifier: Apache-2.0
"""How much a model minds errors in its keys and values, channel by channel, and the steps that follow from it.

The measure is the diagonal of the Fisher information: the mean square of the gradient of the log-likelihood of tokens
drawn from the model itself. An error of variance v in an element moves the next-token distribution by a KL divergence
of half its Fisher information times v, so steps that weigh channels by it cost least at a given rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvstore.calibration import SINK_TOKENS
from kvstore.engines.past import Run, continue_run, frozen

_DRAWS = 2
_CHANNEL_POWER = -0.5
_HEAD_POWER = -0.25
_MAX_OCTAVES = 1.0
"""Of a head's weight: what few tokens say of a head must not make its errors large."""
_MAX_LOG_STEP = 24
_FLOOR = 1e-4
"""Of the mean: a channel without any effect on these tokens may have one on others."""


def log_steps(model: Any, runs: Sequence[Run], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Measure how coarse each channel may be; see `Moments.calibration`.

    Args:
        model: a transformers model that can be attached; it is left as it was.
        runs: tokens with continuations.
        generator: on the CPU; draws labels.

    Returns:
        For keys and for values, [num_layers, kv_heads, dim] int8, eighths of an octave. Their mean is 0 over the
        channels of a head and over heads, so they hardly change the rate.
    """
    shape, value_dim = runs[0].keys.shape, runs[0].values.shape[3]
    with frozen(model):
        keys = torch.zeros(*shape[:2], shape[3], dtype=torch.float64)
        values = torch.zeros(*shape[:2], dtype=torch.float64)
        for run in runs:
            _add_fisher(model, run, generator, keys, values)
        variance = torch.stack([_head_variance(run.keys) for run in runs]).mean(0)
    floored = (keys + _FLOOR * keys.mean(2, keepdim=True)).clamp_min(1e-300)
    channels = _centred(_CHANNEL_POWER * floored.log2(), (2,))
    key_heads = _head_octaves(keys.mean(2) * variance)
    value_heads = _head_octaves(values)
    return (
        _as_log_step(channels + key_heads[..., None]),
        _as_log_step(value_heads[..., None].expand(*shape[:2], value_dim)),
    )


def _add_fisher(model: Any, run: Run, generator: torch.Generator, keys: Tensor, values: Tensor) -> None:
    """Add a run's Fisher information: of keys as they are, of values relative to the rms of their row."""
    # Leaves of their own: what was made in inference mode cannot take part in gradients.
    past_keys = run.keys.clone().requires_grad_(True)
    past_values = run.values.clone().requires_grad_(True)
    with torch.enable_grad():
        logs = continue_run(model, past_keys, past_values, run.continuation)
        for draw in range(_DRAWS):
            labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
            key_gradient, value_gradient = torch.autograd.grad(
                logs.gather(1, labels).sum(), (past_keys, past_values), retain_graph=draw < _DRAWS - 1
            )
            for layer in range(keys.shape[0]):  # one at a time: float64 of a whole run is large
                keys[layer] += key_gradient[layer, :, SINK_TOKENS:].double().square().sum(1).cpu()
                rows = run.values[layer, :, SINK_TOKENS:].double().square().mean(2, keepdim=True)
                values[layer] += (value_gradient[layer, :, SINK_TOKENS:].double().square() * rows).sum((1, 2)).cpu()


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
