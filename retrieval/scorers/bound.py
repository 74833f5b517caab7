# SPDX-License-Identifier: Apache-2.0
"""The largest inner product that a key inside a box or a sphere can have with a query, as one inner product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bound:
    """Lifts `q` to `[max(q, 0) | min(q, 0)]`, to be met with `[upper | lower]` sides of a box.

    The inner product is `sum_i max(q_i upper_i, q_i lower_i)`, because each term takes the side that its sign wants; so
    a sum over queries is one inner product, too.

    Source: Quest (arXiv:2406.10774), its score; the lift is ours.
    """

    def lift(self, queries: Tensor) -> Tensor:
        """See `Scorer`."""
        return torch.cat([queries.clamp_min(0), queries.clamp_max(0)], dim=-1)


@dataclass(frozen=True, slots=True)
class SphereBound:
    """Lifts `q` to `[q | |q|]`, to be met with `[centre | radius]` of a sphere.

    Source: Cauchy and Schwarz: no key within `radius` of `centre` has a larger inner product with `q`.
    """

    def lift(self, queries: Tensor) -> Tensor:
        """See `Scorer`."""
        return torch.cat([queries, queries.norm(dim=-1, keepdim=True)], dim=-1)
