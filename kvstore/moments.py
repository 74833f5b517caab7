# SPDX-License-Identifier: Apache-2.0
"""Sums over tokens of keys and values, and what they say of every channel. Sums are float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ShapeError

_MAX_LOG_RMS = 1000
_ZERO_LOG_RMS = -800
_MAX_RHO = 250
_STEP_POWER = -0.75
"""Of a key channel's sigma. Queries are larger where keys vary more, so equal steps would spend bits on the channels
that matter least."""


@dataclass(frozen=True, slots=True, eq=False)
class PlaneParameters:
    """What K or V of one layer looks like (FORMAT.md section 6.2).

    Args:
        log_rms: [kv_heads] int16, 8 log2 of the rms of a head's elements, their mean removed.
        mean: [kv_heads, dim] bfloat16.
        log_sigma: [kv_heads, dim] int8, 32 log2 of a channel's standard deviation relative to the head's rms.
        log_residual: [kv_heads, dim] int8, the same of what is left when a token is predicted from the one before.
        rho: [kv_heads, dim] uint8, that prediction's factor in 1/256.
        log_step: [kv_heads, dim] int8, 8 log2 of how much coarser than others a channel is quantised.
    """

    log_rms: Tensor
    mean: Tensor
    log_sigma: Tensor
    log_residual: Tensor
    rho: Tensor
    log_step: Tensor


class Moments:
    """Collects what a calibration is made of, some tokens at a time.

    Args:
        num_layers: layers of the model.
        kv_heads: its KV heads.
        key_dim: elements of a key.
        value_dim: elements of a value.
    """

    def __init__(self, num_layers: int, kv_heads: int, key_dim: int, value_dim: int) -> None:
        self._keys = _PlaneSums((num_layers, kv_heads, key_dim))
        self._values = _PlaneSums((num_layers, kv_heads, value_dim))

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._keys.count

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add consecutive tokens; infinities and NaNs count as zero.

        Args:
            keys: [num_layers, kv_heads, num_tokens, key_dim], as they are stored.
            values: [num_layers, kv_heads, num_tokens, value_dim].
        """
        self._keys.add(keys)
        self._values.add(values)

    def planes(self, log_steps: tuple[Tensor, Tensor] | None = None) -> list[PlaneParameters]:
        """Describe K0, V0, K1, V1, ...; at least one token was added.

        Args:
            log_steps: for keys and for values, [num_layers, kv_heads, dim] int8, how much coarser a channel may be
                quantised than others, in eighths of an octave, as the model was found to be sensitive. None where no
                model is at hand: then keys of channels that vary less get larger steps.

        Raises:
            ShapeError: `log_steps` do not fit.
        """
        keys, values = self._keys.key_fields(), self._values.value_fields()
        steps = log_steps or (_steps_by_sigma(keys["log_sigma"]), torch.zeros(self._values.shape, dtype=torch.int8))
        for given, sums in zip(steps, (self._keys, self._values), strict=True):
            if given.shape != sums.shape or given.dtype != torch.int8:
                raise ShapeError(f"log_steps are {list(given.shape)} {given.dtype}; wanted {list(sums.shape)} int8")
        keys["log_step"], values["log_step"] = steps
        return [
            PlaneParameters(**{name: field[layer] for name, field in fields.items()})
            for layer in range(self._keys.shape[0])
            for fields in (keys, values)
        ]


class _PlaneSums:
    """Sums over tokens, `[num_layers, kv_heads, dim]` each."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.count = 0
        self.num_pairs = 0
        self.sum, self.square, self.relative = _zeros(shape), _zeros(shape), _zeros(shape)
        # Of pairs of neighbours: the one before, the one after, their squares and product.
        self.before, self.after = _zeros(shape), _zeros(shape)
        self.before_square, self.after_square, self.product = _zeros(shape), _zeros(shape), _zeros(shape)

    def add(self, rows: Tensor) -> None:
        """Add a run of tokens, `[num_layers, kv_heads, num_tokens, dim]`."""
        self.count += rows.shape[2]
        self.num_pairs += max(rows.shape[2] - 1, 0)
        for layer, plane in enumerate(rows.detach()):  # one at a time: float64 of a whole run is large
            self._add_layer(layer, plane.cpu().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    def _add_layer(self, layer: int, rows: Tensor) -> None:
        square = rows.square()
        self.sum[layer] += rows.sum(1)
        self.square[layer] += square.sum(1)
        row_square = square.mean(2, keepdim=True)
        self.relative[layer] += torch.where(row_square > 0, square / row_square, 0.0).sum(1)
        before, after = rows[:, :-1], rows[:, 1:]
        self.before[layer] += before.sum(1)
        self.after[layer] += after.sum(1)
        self.before_square[layer] += square[:, :-1].sum(1)
        self.after_square[layer] += square[:, 1:].sum(1)
        self.product[layer] += (before * after).sum(1)

    def key_fields(self) -> dict[str, Tensor]:
        """Keys are coded with one step a head, their mean removed, each token predicted from the one before."""
        fields, mean = self._common()
        count = max(self.num_pairs, 1)
        before = self.before_square - 2 * mean * self.before + self.num_pairs * mean.square()
        after = self.after_square - 2 * mean * self.after + self.num_pairs * mean.square()
        product = self.product - mean * (self.before + self.after) + self.num_pairs * mean.square()
        rho = torch.where(before > 0, product / before, 0.0).mul(256).round().clamp(0, _MAX_RHO)
        factor = rho / 256
        residual = (after - 2 * factor * product + factor.square() * before).clamp_min(0) / count
        reference = fields["log_rms"][..., None].double() * 4
        fields["log_residual"] = _relative_log(residual, reference)
        fields["rho"] = rho.to(torch.uint8)
        return fields

    def value_fields(self) -> dict[str, Tensor]:
        """Values are coded with one step a row, by the row's rms, and nothing removed: so is their sigma."""
        fields, _ = self._common()
        fields["log_sigma"] = _relative_log(self.relative / self.count, _zeros(self.shape))
        fields["log_residual"] = fields["log_sigma"]
        fields["rho"] = torch.zeros(self.shape, dtype=torch.uint8)
        return fields

    def _common(self) -> tuple[dict[str, Tensor], Tensor]:
        """Fields that depend on no neighbour, and the mean as it is rounded."""
        rounded = (self.sum / self.count).to(torch.bfloat16)
        mean = rounded.double()
        variance = (self.square / self.count - 2 * mean * self.sum / self.count + mean.square()).clamp_min(0)
        head = variance.mean(2)
        log_rms = torch.where(head > 0, (4 * head.log2()).round(), float(_ZERO_LOG_RMS)).clamp(
            -_MAX_LOG_RMS, _MAX_LOG_RMS
        )
        fields = {
            "log_rms": log_rms.to(torch.int16),
            "mean": rounded,
            "log_sigma": _relative_log(variance, log_rms[..., None] * 4),
        }
        return fields, mean


def _zeros(shape: tuple[int, int, int]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _steps_by_sigma(log_sigma: Tensor) -> Tensor:
    octaves = _STEP_POWER * log_sigma.double() / 32
    return (8 * (octaves - octaves.mean(2, keepdim=True))).round().to(torch.int8)


def _relative_log(variance: Tensor, reference: Tensor) -> Tensor:
    """32 log2 of a standard deviation less `reference`, as int8."""
    logs = (16 * variance.log2()).round() - reference
    return torch.where(variance > 0, logs, -128.0).clamp(-128, 127).to(torch.int8)
