# SPDX-License-Identifier: Apache-2.0
"""Selectors around another one: with the units beside those that it would choose, or with whole runs of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.selectors.budget import Selector, TokenBudget


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Units up to `reach` beside a good one come right behind it, before the next good one.

    A unit scores what the best unit within reach scores, but just less than that one itself. `inner` chooses by these
    scores, so its budget and its other rules hold; the reader gets what was said before and after a hit.

    Source: ours; InfLLM (arXiv:2402.04617) and StreamKV (arXiv:2511.07278) reach the same by longer units.

    Args:
        reach: units to each side.
        inner: chooses.

    Raises:
        ConfigError: `reach` is not positive.
    """

    reach: int = 1
    inner: Selector = field(default_factory=TokenBudget)

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise ConfigError(f"neighbours up to {self.reach} units away; reach at least one")

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`."""
        if scores.shape[1] == 0:
            return scores > 0
        near = torch.nn.functional.max_pool1d(scores[:, None], 2 * self.reach + 1, stride=1, padding=self.reach)[:, 0]
        lifted = torch.maximum(scores, near.nextafter(scores.new_tensor(-math.inf)))
        return self.inner.select(lifted.masked_fill_(scores.isneginf(), -math.inf), sizes, budget_tokens)


@dataclass(frozen=True, slots=True)
class Chunked:
    """Runs of `num_units` units that follow each other are scored by their mean, and chosen as a whole.

    Units that may not be chosen count neither in a run's mean nor in its tokens. The runs begin at the first unit; the
    last one may be shorter.

    Source: ReKV (arXiv:2503.00540), `chunk_size` of its code.

    Args:
        num_units: of a run.
        inner: chooses among runs.

    Raises:
        ConfigError: `num_units` is not positive.
    """

    num_units: int
    inner: Selector = field(default_factory=TokenBudget)

    def __post_init__(self) -> None:
        if self.num_units < 1:
            raise ConfigError(f"runs of {self.num_units} units; they hold at least one")

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`."""
        num_units = scores.shape[1]
        if num_units == 0:
            return scores > 0
        is_eligible = ~scores.isneginf()
        short = (0, -num_units % self.num_units)
        counts = self._runs(is_eligible, short).sum(dim=2)
        sums = self._runs(scores.masked_fill(~is_eligible, 0), short).sum(dim=2)
        means = (sums / counts.clamp_min(1)).masked_fill(counts == 0, -math.inf)
        num_tokens = self._runs(sizes * is_eligible, short).sum(dim=2)
        # A run of none weighs as much as the others, or it would make room for more candidates than there are.
        num_tokens = num_tokens.masked_fill(counts == 0, max(1, int(num_tokens.max())))
        runs = self.inner.select(means, num_tokens, budget_tokens)
        return runs.repeat_interleave(self.num_units, dim=1)[:, :num_units] & is_eligible

    def _runs(self, of_units: Tensor, short: tuple[int, int]) -> Tensor:
        padded = torch.nn.functional.pad(of_units, short)
        return padded.view(of_units.shape[0], -1, self.num_units)
