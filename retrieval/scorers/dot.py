# SPDX-License-Identifier: Apache-2.0
"""The inner product of a query with the key that stands for a unit, its cosine, or nothing at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dot:
    """Leaves the query as it is: the score is the logit that the summary, as a key, would have.

    Source: InfLLM (arXiv:2402.04617), and the code of ReKV (arXiv:2503.00540), whose paper says cosine.
    """

    def lift(self, queries: Tensor) -> Tensor:
        """See `Scorer`."""
        return queries


@dataclass(frozen=True, slots=True)
class Cosine:
    """Scales the query of each head to length one, to be met with `Normalised` summaries.

    Heads of a group then count alike, however long their queries are; with `Dot`, long ones count more.

    Source: the paper of ReKV (arXiv:2503.00540), which takes the cosine of all heads of a layer as one vector.
    """

    def lift(self, queries: Tensor) -> Tensor:
        """See `Scorer`."""
        return torch.nn.functional.normalize(queries, dim=-1)


@dataclass(frozen=True, slots=True)
class Constant:
    """Asks for what a summary of one element says by itself, whatever the query is."""

    def lift(self, queries: Tensor) -> Tensor:
        """See `Scorer`."""
        return torch.ones_like(queries[..., :1])
