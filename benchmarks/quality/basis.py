# SPDX-License-Identifier: Apache-2.0
"""Keys and values in a calibrated basis over several layers, simulated: what a profile of that kind would bring."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.calibration import SINK_TOKENS
from quality.corpus import Corpus
from quality.key_transforms import SINK_BITS, coded_bits, others, shape_of, with_sinks
from quality.ours import log_steps_without
from quality.rivals import BLOCK_TOKENS
from quality.scheme import Coded

_LAYERS = 5
"""Layers of one basis."""
_DROPPED = -1
"""Class of table below which a component is left out."""
_KEY_STEP, _VALUE_STEP = 2.0, 2 ** (6 / 8)
_SCALE_BITS = 4
"""Of V, per (token, head), entropy-coded."""
_SEGMENT_BITS = 8 * (128 + 8)
"""States and table entry of a segment: one block of one group of layers."""


def basis_coded(rows: Tensor, fitted: list[Tensor], step: float) -> tuple[Tensor, float]:
    """Quantise in the principal components of several layers and heads (KVTC, arXiv 2511.01815), one step for all.

    Args:
        rows: [layers, heads, tokens, dim], already divided by what their steps are relative to.
        fitted: the same of the documents that the components are taken from.
        step: of every component.
    """
    restored, bits = torch.empty_like(rows), 0.0
    for first in range(0, rows.shape[0], _LAYERS):
        group = slice(first, first + _LAYERS)
        energy = sum(_flat(part[group]).T @ _flat(part[group]) / part.shape[2] for part in fitted)
        assert isinstance(energy, Tensor), "there is another document"
        variance, basis = torch.linalg.eigh(energy / len(fitted))
        spread = variance.clamp_min(0).sqrt() / step
        kept = (2 * spread.clamp_min(2**-8).log2()).round() + 6 > _DROPPED
        basis, spread = basis[:, kept], spread[kept]
        symbols = (_flat(rows[group]) @ basis / step).round()
        bits += coded_bits(symbols[SINK_TOKENS:], spread)
        back = (symbols * step @ basis.T).view(rows.shape[2], *rows[group].shape[:2], rows.shape[3])
        restored[group] = back.permute(1, 2, 0, 3)
    return restored, bits


def _flat(rows: Tensor) -> Tensor:
    """[tokens, layers x heads x dim]."""
    return rows.permute(2, 0, 1, 3).flatten(1)


def code(corpus: Corpus, document: int) -> Coded:
    """Both sides in bases of their own; K with its mean removed, V row by row divided by its rms.

    The bases are part of the calibration, 2 bytes an element, and not counted.
    """
    key_steps, value_steps = (steps.float().div(8).exp2()[:, :, None] for steps in log_steps_without(corpus, document))
    shape = shape_of(others(corpus.keys, document))
    weight = shape.rms * key_steps
    keys, values = corpus.keys[document].float(), corpus.values[document].float()
    fitted = [(part - shape.mean) / weight for part in others(corpus.keys, document)]
    back, key_bits = basis_coded((keys - shape.mean) / weight, fitted, _KEY_STEP)
    keys_back = with_sinks(back * weight + shape.mean, keys)
    scale = _rms(values) * value_steps
    fitted = [part / _rms(part) / value_steps for part in others(corpus.values, document)]
    back, value_bits = basis_coded(values / scale, fitted, _VALUE_STEP)
    around = keys.shape[2] / BLOCK_TOKENS * keys.shape[0] / _LAYERS * _SEGMENT_BITS + SINK_BITS * keys[:, :, 0].numel()
    scales = scale[..., 0].numel() * _SCALE_BITS
    return Coded(keys_back, with_sinks(back * scale, values), key_bits + around, value_bits + around + scales)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
