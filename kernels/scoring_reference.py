# SPDX-License-Identifier: Apache-2.0
"""Scores of units, for all partitions at once, and the best; in plain torch, as the specification of its twin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError

GROUPS = ("sum", "softmax_mean", "softmax_max")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How all that ask a partition come to one score per unit.

    Args:
        group: `sum` takes the products of the one vector that asks. The others turn the products of each that asks into
            shares of 1 by a softmax over all units, take the mean over query tokens, and of heads the mean
            (`softmax_mean`) or the largest (`softmax_max`).
        num_tokens: query tokens among those that ask; they vary faster than heads. 1 for `sum`.
        scale: multiplies the products before a softmax.
        num_together: partitions in a row that select together, by the sum of their scores: 1, or the KV heads of a
            layer.

    Raises:
        ConfigError: no such group, or fewer than one token or partition.
    """

    group: str = "sum"
    num_tokens: int = 1
    scale: float = 1.0
    num_together: int = 1

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ConfigError(f"no such group: {self.group!r}; it is one of {', '.join(GROUPS)}")
        if min(self.num_tokens, self.num_together) < 1:
            raise ConfigError(
                f"{self.num_tokens} tokens, {self.num_together} partitions; at least one of each is needed"
            )


def score_units(lifted: Tensor, summaries: Tensor, is_eligible: Tensor | None, agreement: Agreement) -> Tensor:
    """Score all units of all partitions; a partition is a KV head, of one layer or of many.

    Args:
        lifted: [num_partitions, num_asking, width]: what asks, see `kvstore.retrieval.view.View.lifted`; one vector
            where the group is `sum`.
        summaries: [num_partitions, num_units, width], same dtype.
        is_eligible: [1 or num_partitions / num_together, num_units] bool: units that may be chosen; None for all. A
            softmax is over all units, whether they may be chosen or not.
        agreement: how scores become one.

    Returns:
        [num_partitions / num_together, num_units] float32; -inf for units that may not be chosen.

    Raises:
        ShapeError: the shapes do not fit each other, or the agreement.
    """
    check_scoring(lifted, summaries, agreement)
    products = torch.bmm(lifted.float(), summaries.float().transpose(1, 2))
    if agreement.group == "sum":
        found = products[:, 0]
    else:
        shares = (products * agreement.scale).softmax(dim=-1).unflatten(1, (-1, agreement.num_tokens)).mean(dim=2)
        found = shares.amax(dim=1) if agreement.group == "softmax_max" else shares.mean(dim=1)
    runs = found.shape[0] // agreement.num_together
    found = found.reshape(runs, agreement.num_together, found.shape[1]).sum(dim=1)
    return found if is_eligible is None else found.masked_fill(~is_eligible, float("-inf"))


def best_of(scores: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Find the best units of each partition.

    Args:
        scores: [num_partitions, num_units] float32, from `score_units`.
        num_best: how many; of fewer units, all.

    Returns:
        Their scores, descending, and their numbers, `[num_partitions, num_best]` float32 and int64. A score of -inf
        says that no more units may be chosen.
    """
    found = scores.topk(min(num_best, scores.shape[1]), dim=1)
    return found.values, found.indices


def check_scoring(lifted: Tensor, summaries: Tensor, agreement: Agreement) -> None:
    """Refuse what `score_units` cannot score; see there.

    Raises:
        ShapeError: see `score_units`.
    """
    num_partitions, num_asking, width = lifted.shape
    if (num_partitions, width) != (summaries.shape[0], summaries.shape[2]) or lifted.dtype is not summaries.dtype:
        raise ShapeError(
            f"what asks is {list(lifted.shape)} {lifted.dtype}, summaries are {list(summaries.shape)} "
            f"{summaries.dtype}; they share partitions, width and dtype"
        )
    if num_partitions % agreement.num_together:
        raise ShapeError(f"{num_partitions} partitions do not part into runs of {agreement.num_together}")
    one = agreement.group == "sum"
    if num_asking < 1 or num_asking % agreement.num_tokens or (one and num_asking != 1):
        raise ShapeError(
            f"{num_asking} vectors ask by {agreement.group} with {agreement.num_tokens} tokens; a sum takes one vector,"
            " else each head asks with each token"
        )
