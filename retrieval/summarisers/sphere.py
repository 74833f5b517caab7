# SPDX-License-Identifier: Apache-2.0
"""Spheres around the keys of a unit, and how far its keys are from their mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.retrieval.summarisers.bounds import reduce
from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Units


@dataclass(frozen=True, slots=True)
class Sphere:
    """The mean key, and the distance of the farthest key from it: `[centre | radius]`.

    Source: LycheeCluster's bound for clusters of tokens; half as wide as a box, and as safe.
    """

    def width(self, key_dim: int) -> int:
        """A key and one element."""
        return key_dim + 1

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """See `Summariser`."""
        centre = reduce(keys, units, "mean")
        distance = (keys - centre[:, units.unit_of_place()]).norm(dim=2, keepdim=True)
        return torch.cat([centre, reduce(distance, units, "amax")], dim=2)


@dataclass(frozen=True, slots=True)
class Outlier:
    """The lowest cosine of a key of the unit with the unit's mean, negated: large where a mean says little.

    Source: ShadowKV (arXiv:2410.21465).
    """

    def width(self, key_dim: int) -> int:
        """One element."""
        return 1

    def summarise(self, keys: Tensor, tokens: LayerTokens, units: Units, heads: slice) -> Tensor:
        """See `Summariser`."""
        mean = reduce(keys, units, "mean")[:, units.unit_of_place()]
        return -reduce(torch.nn.functional.cosine_similarity(keys, mean, dim=2)[:, :, None], units, "amin")
