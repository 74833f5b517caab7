# SPDX-License-Identifier: Apache-2.0
"""Triggers: when a question's blocks are selected anew."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class Choice(StrEnum):
    """What a forward does in one layer.

    KEEP: it attends to what was selected last.
    SELECT: it selects, and attends to that.
    SELECT_NEXT: it attends to what was selected last, and selects for the forward after it.
    """

    KEEP = "keep"
    SELECT = "select"
    SELECT_NEXT = "select_next"


class Trigger(Protocol):
    """Decides, layer by layer; the first forward of a question selects whatever it says."""

    def choose(self, step: int, query: Tensor, previous: Tensor) -> Choice:
        """Decide for a forward that is not the first one.

        Args:
            step: forwards since the question's first, from 1 on.
            query: [num_heads, key_dim] float32: the newest query of the layer, before RoPE (or as it came).
            previous: the same of the forward that selected last.
        """


@dataclass(frozen=True, slots=True)
class EveryStep:
    """Selects at every forward: each decoded token, or each chunk that is appended."""

    def choose(self, step: int, query: Tensor, previous: Tensor) -> Choice:
        """See `Trigger`."""
        return Choice.SELECT


@dataclass(frozen=True, slots=True)
class OncePerQuestion:
    """Selects once, by the question."""

    def choose(self, step: int, query: Tensor, previous: Tensor) -> Choice:
        """See `Trigger`."""
        return Choice.KEEP
