# SPDX-License-Identifier: Apache-2.0
"""Summaries of length one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Units
from kvstore.retrieval.view import Summariser


@dataclass(frozen=True, slots=True)
class Normalised:
    """Summaries of another kind, each scaled to length one: with the scorer `Cosine`, their cosine with a query.

    Args:
        inner: makes them.
    """

    inner: Summariser

    def width(self, key_dim: int) -> int:
        """That of `inner`."""
        return self.inner.width(key_dim)

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """See `Summariser`."""
        return torch.nn.functional.normalize(self.inner.summarise(keys, tokens, units, heads), dim=2)
