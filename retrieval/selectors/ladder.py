# SPDX-License-Identifier: Apache-2.0
"""A selector by position alone: a ladder across layers, so that together they hold what each could not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ladder:
    """Of every `width` units in order of time, `rungs` that follow each other; which ones shifts with the layer.

    Rungs of layer `l` begin at `l % (width - rungs + 1)` of each ladder. The oldest units are thinned first, and only
    as many ladders as the budget asks for; when all have been thinned, what is left is thinned again from the oldest
    on. So the newest units are all there, and older ones ever more sparse. Scores only say which units may be chosen.
    Where less than a ladder is left and the budget is still exceeded, the newest units are taken while they fit, the
    very newest in any case.

    Source: LaCache (arXiv:2507.14204, ICML 2025), the pattern and the compaction of its code, which thins its cache of
    tokens as it grows; ours thins anew at every selection, by units, and for one budget in all layers.

    Args:
        width: units of a ladder: `1 + ceil((num_layers - span) / (span - overlap))` in the source's terms.
        rungs: units that a layer keeps of each: `ceil(span / (span - overlap))` there.
        layer: counted from 0; see `in_layer`.

    Raises:
        ConfigError: `rungs` is not from 1 to `width - 1`.
    """

    width: int
    rungs: int = 1
    layer: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rungs < self.width:
            raise ConfigError(f"ladders of {self.width} units with {self.rungs} rungs; take 1 to {self.width - 1}")

    def in_layer(self, layer: int) -> Ladder:
        """See `LayeredSelector`."""
        return replace(self, layer=layer)

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`."""
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        if budget_tokens <= 0 or scores.shape[1] == 0:
            return chosen
        is_eligible = ~scores.isneginf()
        if bool((is_eligible == is_eligible[:1]).all()) and bool((sizes == sizes[:1]).all()):
            chosen[:, self._thinned(is_eligible[0].nonzero()[:, 0], sizes[0], budget_tokens)] = True
            return chosen
        for partition, row in enumerate(is_eligible):  # clusters: every head has its own
            chosen[partition, self._thinned(row.nonzero()[:, 0], sizes[partition], budget_tokens)] = True
        return chosen

    def _thinned(self, units: Tensor, sizes: Tensor, budget: int) -> Tensor:
        """Numbers of the units that stay: `[num_chosen]` int64."""
        while units.shape[0] >= self.width and int(excess := sizes[units].sum() - budget) > 0:
            place = torch.arange(units.shape[0]) % self.width - self.layer % (self.width - self.rungs + 1)
            is_whole = torch.arange(units.shape[0]) < units.shape[0] // self.width * self.width
            is_dropped = ((place < 0) | (place >= self.rungs)) & is_whole
            dropped = (sizes[units] * is_dropped).view(-1).cumsum(0)
            enough = int(torch.searchsorted(dropped, excess))  # the unit whose loss makes the rest fit
            last = (enough // self.width + 1) * self.width
            units = units[~is_dropped | (torch.arange(units.shape[0]) >= last)]
        newest_first = sizes[units].flip(0).cumsum(0)
        num_fitting = max(1, int((newest_first <= budget).sum()))
        return units[-num_fitting:]
