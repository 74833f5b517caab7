# SPDX-License-Identifier: Apache-2.0
"""Ways to prepare keys for quantising, simulated: what the codec chose, and what it did not.

Sizes are cross-entropies under tables of the codec's kind (csrc/codec/FORMAT.md section 4.4), without the overheads of
its records. Sinks are exact. Everything is fitted to the other documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.calibration import SINK_TOKENS
from quality.corpus import Corpus
from quality.ours import log_steps_without
from quality.rivals import BLOCK_TOKENS

SINK_BITS = 16 * SINK_TOKENS
"""Of a channel: its first tokens are exact."""

_RADIUS = 63
_EXCEPTION_BITS = 32
_MAX_RHO = 250 / 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Moments of some documents, [layers, heads, 1, dim] each.

    Args:
        mean: of a channel.
        sigma: standard deviation of a channel.
        rho: correlation of a channel's neighbours in time.
    """

    mean: Tensor
    sigma: Tensor
    rho: Tensor

    @property
    def rms(self) -> Tensor:
        """[layers, heads, 1, 1]: of a head, means removed."""
        return self.sigma.square().mean(-1, keepdim=True).sqrt()


def others(tensor: Tensor, document: int) -> list[Tensor]:
    """The other documents' tokens behind the sinks, float32."""
    return [tensor[other][:, :, SINK_TOKENS:].float() for other in range(len(tensor)) if other != document]


def shape_of(parts: list[Tensor]) -> Shape:
    """Measure [layers, heads, tokens, dim] of several documents."""
    mean = torch.stack([part.mean(2, keepdim=True) for part in parts]).mean(0)
    centred = [part - mean for part in parts]
    variance = torch.stack([part.square().mean(2, keepdim=True) for part in centred]).mean(0)
    lagged = torch.stack([(part[:, :, 1:] * part[:, :, :-1]).mean(2, keepdim=True) for part in centred]).mean(0)
    return Shape(mean, variance.sqrt(), (lagged / variance).clamp(0, _MAX_RHO))


def coded_bits(symbols: Tensor, spread: Tensor) -> float:
    """Bits of quantised values under the table of each channel's class.

    Args:
        symbols: [..., channels] integers in float32.
        spread: [channels] standard deviation in steps.
    """
    classes = (2 * spread.clamp_min(2**-8).log2()).round().add(6).clamp(0, 15).long()
    bits = 0.0
    flat = symbols.reshape(-1, symbols.shape[-1])
    for k in classes.unique().tolist():
        radius = min(max(int(-(-4.5 * 2 ** ((k - 6) / 2) // 1)), 1), _RADIUS)
        some = flat[:, classes == k]
        counts = torch.bincount((some.clamp(-radius, radius) + radius).long().flatten(), minlength=2 * radius + 1)
        bits -= float((counts * _table(k, radius).log2()).sum())
        bits += float((some.abs() > radius).sum()) * _EXCEPTION_BITS
    return bits


def _table(k: int, radius: int) -> Tensor:
    """[2 radius + 1] probabilities: 31/32 N(0, sigma) + 1/32 N(0, 2 sigma) over whole numbers, at least 1/1024."""
    edges = torch.arange(-radius - 0.5, radius + 1, dtype=torch.float64)
    sigma = 2 ** ((k - 6) / 2)
    mass = sum(
        share * torch.special.ndtr(edges / (scale * sigma)).diff() for share, scale in ((31 / 32, 1.0), (1 / 32, 2.0))
    )
    assert isinstance(mass, Tensor), "two parts were added"
    table = (mass / mass.sum()).clamp_min(1 / 1024)
    return table / table.sum()


def quantised(rows: Tensor, step: Tensor, rho: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantise centred rows: symbols, and what comes back.

    Args:
        rows: [layers, heads, tokens, dim].
        step: broadcasts against `rows`, one token.
        rho: [layers, heads, 1, dim], to predict each token from the one before, block by block; None for not at all.
    """
    if rho is None:
        symbols = (rows / step).round()
        return symbols, symbols * step
    blocks = rows.unflatten(2, (-1, BLOCK_TOKENS))
    symbols, restored = torch.empty_like(blocks), torch.empty_like(blocks)
    before = torch.zeros_like(blocks[:, :, :, 0])
    for token in range(BLOCK_TOKENS):
        predicted = rho * before
        symbols[:, :, :, token] = ((blocks[:, :, :, token] - predicted) / step).round()
        before = symbols[:, :, :, token] * step + predicted
        restored[:, :, :, token] = before
    return symbols.flatten(2, 3), restored.flatten(2, 3)


@dataclass(frozen=True, slots=True)
class KeyTransform:
    """One way to quantise keys before RoPE, their means removed.

    Args:
        weights: `head`: one step per head; `sigma`: a channel's step falls as its deviation rises, to the power 3/4;
            `model`: steps by how much the model minds errors.
        is_predicted: each token from the one before.
    """

    weights: str
    is_predicted: bool

    @property
    def name(self) -> str:
        """For the report."""
        return f"steps by {self.weights}{', predicted' if self.is_predicted else ''}"

    def code(self, corpus: Corpus, document: int, mult: int) -> tuple[Tensor, float]:
        """Keys that come back, and bits; a step is 2^(-mult / 8) times a head's rms times its weight."""
        shape = shape_of(others(corpus.keys, document))
        step = shape.rms * 2 ** (-mult / 8) * self._weight(corpus, document, shape)
        rho = shape.rho if self.is_predicted else None
        given = corpus.keys[document].float()
        symbols, restored = quantised(given - shape.mean, step, rho)
        spread = shape.sigma / step
        if rho is not None:
            spread = spread * (1 - rho.square()).sqrt()
        coded = symbols[:, :, SINK_TOKENS:].transpose(1, 2).flatten(2).transpose(0, 1).flatten(1)
        return with_sinks(restored + shape.mean, given), coded_bits(coded, spread.flatten())

    def _weight(self, corpus: Corpus, document: int, shape: Shape) -> Tensor:
        if self.weights == "model":
            return (log_steps_without(corpus, document)[0].float() / 8).exp2()[:, :, None]
        power = -0.75 if self.weights == "sigma" else 0.0
        octaves = power * shape.sigma.log2()
        return (octaves - octaves.mean(-1, keepdim=True)).exp2()


def with_sinks(restored: Tensor, given: Tensor) -> Tensor:
    """What a record gives back: bfloat16, the first tokens exact."""
    restored = restored.bfloat16().float()
    restored[:, :, :SINK_TOKENS] = given[:, :, :SINK_TOKENS]
    return restored


KEY_TRANSFORMS = [
    KeyTransform(weights, is_predicted) for weights in ("head", "sigma", "model") for is_predicted in (False, True)
]
MULTS = (8, 2, -4)
