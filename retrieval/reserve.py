# SPDX-License-Identifier: Apache-2.0
"""A fusion that reserves a share of what is chosen for the second of two views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Reserve:
    """Of however many units are chosen, the second view has its share, and the first one the rest.

    A budget takes the best `share * n` units of the second view and the best `(1 - share) * n` of the first, for an `n`
    that grows where the two want the same ones. The score is minus that `n`.

    Source: ShadowKV (arXiv:2410.21465), which keeps 24 outlier chunks beside a budget of 1024 tokens, 48 beside 2048.

    Args:
        share: of the second view; above 0, below 1.

    Raises:
        ConfigError: `share` is 0, 1 or beyond.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"a reserve of {self.share} of the units; use a share above 0 and below 1")

    def fuse(self, scores: Sequence[Tensor]) -> Tensor:
        """See `Fusion`."""
        asked, reserved = scores
        needed = torch.minimum((_ranks(asked) + 1) / (1 - self.share), (_ranks(reserved) + 1) / self.share)
        return -needed.masked_fill_(asked.isneginf(), float("inf"))


def _ranks(scores: Tensor) -> Tensor:
    """Place of each score in its row, 0 for the largest; of equals, the earlier ones first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device)
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))
