# SPDX-License-Identifier: Apache-2.0
"""Boxes around the keys of a unit: what a query can meet in it at most, or about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Units

# Pages of one size are a matter of a view, many times as fast as what serves units of any size.
_OF_EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(dim=2),
    "sum": lambda rows: rows.sum(dim=2),
    "amax": lambda rows: rows.amax(dim=2),
    "amin": lambda rows: rows.amin(dim=2),
}


@dataclass(frozen=True, slots=True)
class MinMax:
    """Largest and smallest element of each channel, side by side: `[max | min]`.

    Source: Quest (arXiv:2406.10774).
    """

    def width(self, key_dim: int) -> int:
        """Two keys."""
        return 2 * key_dim

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """See `Summariser`."""
        return torch.cat([reduce(keys, units, "amax"), reduce(keys, units, "amin")], dim=2)


@dataclass(frozen=True, slots=True)
class CuboidMean:
    """The middle of the box, moved by the mean distance from it, up and down: `[centre + spread | centre - spread]`.

    Outliers move the sides less than in `MinMax`.

    Source: ArkVale (NeurIPS 2024).
    """

    def width(self, key_dim: int) -> int:
        """Two keys."""
        return 2 * key_dim

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """See `Summariser`."""
        centre = (reduce(keys, units, "amax") + reduce(keys, units, "amin")) / 2
        spread = reduce((keys - centre[:, units.unit_of_place()]).abs(), units, "mean")
        return torch.cat([centre + spread, centre - spread], dim=2)


def reduce(keys: Tensor, units: Units, how: str) -> Tensor:
    """Reduce the rows of each unit to one.

    Args:
        keys: [num_heads, num_tokens, dim] in the order of `units.tokens`.
        units: how they are cut.
        how: `mean`, `sum`, `amax` or `amin`.

    Returns:
        [num_heads, num_units, dim].
    """
    sizes = units.sizes
    if bool((sizes == sizes[:1]).all()) and units.num_units:
        return _OF_EQUAL[how](keys.unflatten(1, (units.num_units, -1)))
    lengths = sizes.expand(keys.shape[0], -1).contiguous()
    return torch.segment_reduce(keys.contiguous(), how.removeprefix("a"), lengths=lengths, axis=1)
