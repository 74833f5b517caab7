# SPDX-License-Identifier: Apache-2.0
"""A selector with one budget for all partitions: heads, or layers, that need more read more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The best units of each partition up to one share of its attention, the same share in all of them.

    Scores of a partition are standardised (mean 0, deviation 1), because heads and layers have scales of their own, and
    made shares by a softmax. The share up to which all read is the one that spends the budget: a peaked partition
    reaches it with few units, a flat one needs many. The best unit of every partition is taken even when these alone
    exceed the budget.

    Over the KV heads of one layer it is head-adaptive; over those of all layers (`AcrossLayers`), layer-adaptive.

    Source: StreamKV (arXiv:2511.07278), over layers. Its code finds the share by bisection, counts units, and bends the
    counts into a band around their mean; ours finds it exactly, counts tokens, and leaves them.
    """

    def select(self, scores: Tensor, sizes: Tensor, budget_tokens: int) -> Tensor:
        """See `Selector`."""
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        if budget_tokens <= 0 or scores.shape[1] == 0:
            return chosen
        budget = budget_tokens * scores.shape[0]
        most = min(scores.shape[1], max(1, budget // int(sizes.min())))
        standard = _standardised(scores)
        best = standard.topk(most, dim=1)
        is_eligible = ~best.values.isneginf()
        shares = (best.values - standard.logsumexp(dim=1, keepdim=True)).exp()
        reached = shares.cumsum(1).masked_fill(~is_eligible, float("inf"))
        reached[:, 0] = -1  # taken before all others
        order = reached.flatten().argsort(stable=True)
        num_tokens = sizes.gather(1, best.indices).flatten()
        fits = num_tokens[order].cumsum(0) <= budget
        is_taken = torch.empty_like(fits).scatter_(0, order, fits).view_as(is_eligible)
        is_taken[:, 0] = True
        return chosen.scatter_(1, best.indices, is_taken & is_eligible)


def _standardised(scores: Tensor) -> Tensor:
    """Bring each row to mean 0 and deviation 1; -inf stays -inf and does not count."""
    is_eligible = ~scores.isneginf()
    count = is_eligible.sum(dim=1, keepdim=True)
    mean = scores.masked_fill(~is_eligible, 0).sum(dim=1, keepdim=True) / count.clamp_min(1)
    centred = (scores - mean).masked_fill(~is_eligible, 0)
    variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp_min(1)
    deviation = variance.sqrt().clamp_min(torch.finfo(scores.dtype).tiny)
    return (centred / deviation).masked_fill_(~is_eligible, float("-inf"))
