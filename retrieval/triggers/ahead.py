# SPDX-License-Identifier: Apache-2.0
"""A trigger that puts selection one forward before its use."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvstore.retrieval.triggers.trigger import Choice, Trigger


@dataclass(frozen=True, slots=True)
class Ahead:
    """Where `inner` would select, selects for the next forward, whose blocks can come while this one runs.

    `Ahead(Stride(n))` selects every n-th time; neighbouring queries ask for much the same (docs/retrieval.md).
    """

    inner: Trigger

    def choose(self, step: int, query: Tensor, previous: Tensor) -> Choice:
        """See `Trigger`."""
        choice = self.inner.choose(step, query, previous)
        return Choice.SELECT_NEXT if choice is Choice.SELECT else choice
