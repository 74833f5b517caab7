# SPDX-License-Identifier: Apache-2.0
"""One key that stands for a unit: the mean of its keys, each counted by the attention that it received."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvstore.retrieval.summarisers.bounds import reduce
from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Units

_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class Attended:
    """The mean key, weighted by received attention: `sum(a_j k_j) / sum(a_j)`; the plain mean where none was received.

    A few tokens of a unit get nearly all the attention that the unit will ever get, and nearby queries have already
    shown which. Where `Received` cuts between those tokens and the others, the weights decide by themselves.

    Source: ours; measured in docs/retrieval.md.
    """

    def width(self, key_dim: int) -> int:
        """One key."""
        return key_dim

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """See `Summariser`."""
        received = tokens.received[heads, units.tokens - tokens.first, None].clamp_min(_LEAST)
        return reduce(keys * received, units, "sum") / reduce(received, units, "sum")
