# SPDX-License-Identifier: Apache-2.0
"""A trigger that fires when the query has turned away from the one that selected."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvstore.errors import ConfigError
from kvstore.retrieval.triggers.trigger import Choice


@dataclass(frozen=True, slots=True)
class QueryCosine:
    """Selects when the cosine of the query with the one that selected last, averaged over heads, is below a bound.

    Source: LouisKV (arXiv:2510.11292), `r_t`, whose bound is .7 or .85 by the task; FreeKV (arXiv:2505.13109) has .8 to
    .9. There the query is compared with that of the step before; with the one that selected, slow drift counts, too.

    Raises:
        ConfigError: `threshold` is not from -1 to 1.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"a cosine below {self.threshold}; the bound must be from -1 to 1")

    def choose(self, step: int, query: Tensor, previous: Tensor) -> Choice:
        """See `Trigger`."""
        mean = cosine_similarity(query.float(), previous.float(), dim=-1).mean()
        return Choice.SELECT if float(mean) < self.threshold else Choice.KEEP
