# SPDX-License-Identifier: Apache-2.0
"""The inner product of a query with the key that stands for a unit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dot:
    """Leaves the query as it is: the score is the logit that the summary, as a key, would have.

    Source: InfLLM (arXiv:2402.04617), and the code of ReKV (arXiv:2503.00540), whose paper says cosine.
    """

    def lift(self, queries: Tensor) -> Tensor:
        """See `Scorer`."""
        return queries
