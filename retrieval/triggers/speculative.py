# SPDX-License-Identifier: Apache-2.0
"""A trigger that takes selection off the critical path: each forward reads what the one before it chose."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvstore.retrieval.triggers.trigger import Choice, Trigger


@dataclass(frozen=True, slots=True)
class Speculative:
    """Attends to the selection of the step before, and selects for the next; where `inner` fires it selects at once.

    Source: FreeKV (arXiv:2505.13109), whose correction is `QueryCosine(0.8)` or `QueryCosine(0.9)`, for each KV head by
    itself; ours corrects all heads of a layer together.
    """

    inner: Trigger

    def choose(self, step: int, query: Tensor, previous: Tensor) -> Choice:
        """See `Trigger`."""
        is_urgent = self.inner.choose(step, query, previous) is Choice.SELECT
        return Choice.SELECT if is_urgent else Choice.SELECT_NEXT
