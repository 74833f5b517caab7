# SPDX-License-Identifier: Apache-2.0
"""Triggers by count: every few forwards, or every so many tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.triggers.trigger import Choice


@dataclass(frozen=True, slots=True)
class Stride:
    """Selects at every `num_steps`-th forward; between them the last selection serves.

    Source: LServe (arXiv:2502.14866), which reuses a selection for 4 steps.

    Raises:
        ConfigError: `num_steps` is not positive.
    """

    num_steps: int

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"a selection every {self.num_steps} steps; it must be at least every one")

    def choose(self, step: int, query: Tensor, previous: Tensor) -> Choice:
        """See `Trigger`."""
        return Choice.SELECT if step % self.num_steps == 0 else Choice.KEEP


@dataclass(frozen=True, slots=True)
class EveryChunk:
    """Selects at every forward, and wants those that append cut into forwards of at most `num_tokens` tokens.

    A trigger sees forwards, so whoever runs them reads `num_tokens` and cuts; a decoded token is a chunk of its own.

    Source: InfLLM (arXiv:2402.04617): one lookup for every 512 tokens of a prompt, and one for each decoded token.

    Raises:
        ConfigError: `num_tokens` is not positive.
    """

    num_tokens: int = 512

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigError(f"chunks of {self.num_tokens} tokens; they hold at least one")

    def choose(self, step: int, query: Tensor, previous: Tensor) -> Choice:
        """See `Trigger`."""
        return Choice.SELECT
