# SPDX-License-Identifier: Apache-2.0
"""Bases over several layers: which sums of a group's channels vary together (KVTC, arXiv 2511.01815)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.moments import PlaneParameters

FINEST_MULTS = (-5, -3)
"""Of keys and values: the finest steps that bases are made for, the usual ones of profile `pca`. What is left out is
too small for these (csrc/codec/FORMAT.md section 6.3)."""

MAX_CHANNELS = 1024
"""Most channels of a group: their covariance is a matrix of as many rows."""

_TOKENS_PER_CHANNEL = 4
"""Fewer tokens than this for every channel show directions that are not there."""
_LEAST_SIGMA = 0.11
"""In steps: a component that varies less is left out. It would all but always be rounded to zero."""
_SCALE_UNIT = 4
"""Eighths of an octave: scales of rows of values are told in half octaves (FORMAT.md section 11.2)."""
_MAX_LEVEL = 32767
_MAX_LOG_SCALE = 800
"""As of steps (FORMAT.md section 6.3): squares of larger values are beyond float32."""


def group_layers(num_layers: int, layer_channels: int, num_tokens: int) -> int:
    """Layers that share a basis, as evenly as can be; 0 when the tokens are too few for any.

    Args:
        num_layers: of the model.
        layer_channels: KV heads times the larger of key and value dim.
        num_tokens: that the basis is made from.
    """
    most = min(MAX_CHANNELS, num_tokens // _TOKENS_PER_CHANNEL) // layer_channels
    if most == 0:
        return 0
    num_groups = -(-num_layers // most)
    return -(-num_layers // num_groups)


class BasisSums:
    """Products of all channels of a group with each other, summed over tokens, float32.

    Args:
        num_layers: layers of the model.
        kv_heads: its KV heads.
        key_dim: elements of a key.
        value_dim: elements of a value.
        num_tokens: how many there will be, at least.
    """

    def __init__(self, num_layers: int, kv_heads: int, key_dim: int, value_dim: int, num_tokens: int) -> None:
        self._layers = group_layers(num_layers, kv_heads * max(key_dim, value_dim), num_tokens)
        starts = range(0, num_layers, self._layers) if self._layers else range(0)
        self._groups = [slice(start, min(start + self._layers, num_layers)) for start in starts]
        self._keys = [_Products(_size(group) * kv_heads * key_dim) for group in self._groups]
        self._values = [_Products(_size(group) * kv_heads * value_dim) for group in self._groups]
        self._scales = torch.zeros(2, num_layers, kv_heads, dtype=torch.float64)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens; see `Moments.add`."""
        for group, key_sums, value_sums in zip(self._groups, self._keys, self._values, strict=True):
            key_sums.add(_finite(keys[group]))
            rows = _finite(values[group])
            scales = _scales(rows)
            value_sums.add(rows * torch.exp2(scales / -8)[..., None])
            self._scales[0, group] += scales.double().sum(2)
            self._scales[1, group] += scales.double().square().sum(2)

    def pack(self, planes: Sequence[PlaneParameters]) -> bytes:
        """The bases as a calibration object holds them (FORMAT.md section 8.1); empty when there are none.

        Args:
            planes: K0, V0, K1, V1, ...: what elements are weighed by before their basis.
        """
        if not self._groups:
            return b""
        parts = [struct.pack("<HH", self._layers, 0)]
        for group, key_sums, value_sums in zip(self._groups, self._keys, self._values, strict=True):
            keys, values = planes[0::2][group], planes[1::2][group]
            weights = torch.cat([(plane.log_rms[:, None] + plane.log_step.int()).flatten() for plane in keys])
            mean = torch.cat([plane.mean.double().flatten() for plane in keys])
            parts.append(_pack_basis(key_sums.around(mean), weights, FINEST_MULTS[0], keys, b""))
            weights = torch.cat([plane.log_step.flatten() for plane in values])
            scales = _pack_scales(*self._scales[:, group].flatten(1) / value_sums.count)
            parts.append(_pack_basis(value_sums.second_moment(), weights, FINEST_MULTS[1], values, scales))
        return b"".join(parts)


class _Products:
    """Sums over tokens of channels, and of products of pairs of them."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels)

    def add(self, rows: Tensor) -> None:
        """Add `[layers, heads, tokens, dim]`."""
        flat = rows.permute(2, 0, 1, 3).flatten(1)
        self.count += len(flat)
        self._sum += flat.double().sum(0)
        self._products.addmm_(flat.T, flat)

    def second_moment(self) -> Tensor:
        """[channels, channels] float64."""
        return self._products.double() / self.count

    def around(self, centre: Tensor) -> Tensor:
        """The same of channels less `centre`, [channels] float64."""
        crossed = torch.outer(self._sum / self.count, centre)
        return self.second_moment() - crossed - crossed.T + torch.outer(centre, centre)


def _size(group: slice) -> int:
    return int(group.stop - group.start)


def _finite(rows: Tensor) -> Tensor:
    return rows.detach().cpu().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _scales(rows: Tensor) -> Tensor:
    """Eighths of octaves of every row's rms, in whole units; 0 for a row of zeros."""
    square = rows.square().mean(3)
    scales = (4 / _SCALE_UNIT * square.log2()).round() * _SCALE_UNIT
    return torch.where(square > 0, scales.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE), 0.0)


def _pack_scales(mean: Tensor, square: Tensor) -> bytes:
    base = (mean / _SCALE_UNIT).round() * _SCALE_UNIT
    variance = (square - 2 * base * mean + base.square()).clamp_min(0) / _SCALE_UNIT**2
    return _as_i16(base) + _as_i16(_levels(variance))


def _pack_basis(moment: Tensor, weights: Tensor, mult: int, planes: Sequence[PlaneParameters], scales: bytes) -> bytes:
    """One basis: the directions of a covariance, weighed, that vary enough.

    Args:
        moment: [channels, channels] float64.
        weights: [channels], eighths of octaves.
        mult: of the finest step.
        planes: of the group, for their shape.
        scales: what stands between deviations and components.
    """
    weight = torch.exp2(weights.double() / -8)
    moment = moment.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # of values whose squares are beyond float32
    variance, directions = torch.linalg.eigh(moment * weight[:, None] * weight)
    variance, directions = variance.flip(0), directions.flip(1)
    kept = variance.clamp_min(0).sqrt() * 2 ** (mult / 8) > _LEAST_SIGMA
    variance, directions = variance[kept], directions[:, kept]
    rank = len(variance)
    if rank == 0:
        return struct.pack("<HH", 0, 0)
    heads, dim = planes[0].mean.shape
    # [layers x heads, rank, dim]: what one head's row needs lies together.
    components = directions.unflatten(0, (len(planes) * heads, dim)).transpose(1, 2).to(torch.bfloat16).contiguous()
    data = struct.pack("<HH", rank, 0) + _as_i16(_levels(variance)) + scales
    data += bytes(components.view(torch.uint8).numpy().data)
    return data + bytes(-len(data) % 4)


def _levels(variance: Tensor) -> Tensor:
    """32 log2 of a standard deviation."""
    return torch.where(variance > 0, 16 * variance.log2(), -float(_MAX_LEVEL)).round()


def _as_i16(numbers: Tensor) -> bytes:
    return bytes(numbers.clamp(-_MAX_LEVEL, _MAX_LEVEL).to(torch.int16).numpy().tobytes())
