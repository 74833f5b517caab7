# SPDX-License-Identifier: Apache-2.0
"""A selector with one budget for all layers of a model: layers that need more read more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvstore.retrieval.selectors.adaptive import Adaptive
from kvstore.retrieval.selectors.budget import Selector


@dataclass(frozen=True, slots=True)
class AcrossLayers:
    """What `inner` chooses from the units of all layers at once, KV heads of all of them side by side.

    It takes a pass over the question in which every layer chooses by itself, of as much each; then all choose anew by
    the scores that they gave in that pass.

    Source: StreamKV (arXiv:2511.07278), whose layers share a budget after a pass over the question.

    Args:
        inner: chooses; one that gives every partition the same moves nothing between layers.
    """

    inner: Selector = field(default_factory=Adaptive)

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`: the choice of one layer by itself."""
        return self.inner.select(scores, sizes, budget_tokens)

    def select_together(self, scores: Sequence[Tensor], sizes: Sequence[Tensor], budget_tokens: int) -> list[Tensor]:
        """See `SharingSelector`."""
        if not scores:
            return []
        counts = [each.shape[1] for each in scores]
        # Layers may be cut into different units. What fills up weighs as much as one: it must not make room for more.
        largest = max((int(each.max()) for each in sizes if each.numel()), default=1)
        width = max(counts)
        joined = torch.cat([pad(each, (0, width - each.shape[1]), value=float("-inf")) for each in scores])
        weights = torch.cat([pad(each, (0, width - each.shape[1]), value=largest) for each in sizes])
        chosen = self.inner.select(joined, weights, budget_tokens).split([each.shape[0] for each in scores])
        return [each[:, :count] for each, count in zip(chosen, counts, strict=True)]
