# SPDX-License-Identifier: Apache-2.0
"""Shapes of models: what of them decides how long a layer takes, and the angles at which their keys are met."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GRID = 14
"""Rows and columns of tokens of a made-up frame."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model without its weights.

    Args:
        num_layers: layers that hold KV.
        num_heads: query heads.
        kv_heads: KV heads.
        dim: elements of a key, and of a value.
        theta: base of its rotary angles.
        sections: elements of a half by row of M-RoPE positions; empty for ordinary RoPE.
    """

    num_layers: int
    num_heads: int
    kv_heads: int
    dim: int
    theta: float
    sections: tuple[int, ...] = ()

    def angles(self, num_tokens: int) -> Tensor:
        """Angle of each element of a half at each token, `[num_tokens, dim / 2]` float32; under M-RoPE of frames."""
        frequencies = self.theta ** -(torch.arange(0, self.dim, 2) / self.dim)
        token = torch.arange(num_tokens)
        if not self.sections:
            return token[:, None] * frequencies
        frame, inside = token // _GRID**2, token % _GRID**2
        positions = torch.stack([frame, frame + inside // _GRID, frame + inside % _GRID])
        row = torch.arange(len(self.sections)).repeat_interleave(torch.tensor(self.sections))
        return positions[row].T * frequencies


SHAPES = {
    "llama-3-8b": Shape(32, 32, 8, 128, 500_000.0),
    "qwen2.5-vl-7b": Shape(28, 28, 4, 128, 1_000_000.0, (16, 24, 24)),
}
