# SPDX-License-Identifier: Apache-2.0
"""Fusion: several views of the same units, or the scores of somebody else, and one order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError


class Fusion(Protocol):
    """Makes one score of several."""

    def fuse(self, scores: Sequence[Tensor]) -> Tensor:
        """Fuse `[num_partitions, num_units]` float32 scores, one per view; -inf stays -inf."""


@dataclass(frozen=True, slots=True)
class ExtraScores:
    """What a retriever beside the model's own keys thinks of the units of one layer.

    Args:
        scores: [num_units] or [num_partitions, num_units] float32; -inf where it knows nothing: such units rank last in
            this list, and are not excluded.
        weight: what the list counts; the model's own counts 1.

    Raises:
        ConfigError: the weight is negative, or a score or the weight is not a number.
    """

    scores: Tensor
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"extra scores weigh {self.weight}; the weight must be a number from 0 on")
        if bool(self.scores.isnan().any()):  # sorting would put it first
            raise ConfigError("extra scores hold what is not a number; give -inf where nothing is known")


@dataclass(frozen=True, slots=True)
class ReciprocalRank:
    """Sum of `weight / (offset + rank)`: views need no common scale (Cormack et al., SIGIR 2009).

    Args:
        offset: how much the first ranks count more than those behind; 60 in the source.
        weights: one per view; empty for equal ones.
    """

    offset: float = 60.0
    weights: tuple[float, ...] = ()

    def fuse(self, scores: Sequence[Tensor]) -> Tensor:
        """See `Fusion`."""
        if len(scores) == 1:
            return scores[0]
        fused = torch.zeros_like(scores[0])
        for number, each in enumerate(scores):
            fused += (self.weights[number] if self.weights else 1.0) / (self.offset + 1 + _ranks(each))
        return fused.masked_fill_(scores[0].isneginf(), float("-inf"))


@dataclass(frozen=True, slots=True)
class StandardScores:
    """Sum of scores in standard deviations from the mean over all units; nothing is sorted.

    A view in which few units stand out puts those few far above the rest, and counts there; one in which all units are
    much alike decides among the others.

    Source: the comparison of normalisations by Montague and Aslam (CIKM 2001), there named ZMUV. That neighbours count
    is ours.

    Args:
        weights: one per view; empty for equal ones.
        neighbours: one per view: which share of the scores right before and behind a unit is added to its own, for
            units in the order of the stream; empty for none.
    """

    weights: tuple[float, ...] = ()
    neighbours: tuple[float, ...] = ()

    def fuse(self, scores: Sequence[Tensor]) -> Tensor:
        """See `Fusion`; a view of one partition counts in all of them."""
        if len(scores) == 1:
            return scores[0]
        weights = self.weights or (1.0,) * len(scores)
        shares = self.neighbours or (0.0,) * len(scores)
        fused = torch.zeros_like(scores[0])
        for weight, share, each in zip(weights, shares, scores, strict=True):
            fused += weight * _standardised(each, share)
        return fused.masked_fill_(scores[0].isneginf(), float("-inf"))


def with_extra(scores: Tensor, extra: Sequence[Sequence[ExtraScores]]) -> Tensor:
    """Fuse the lists of several layers with what other retrievers think, by reciprocal rank.

    Args:
        scores: [num_lists, num_units] float32: those of a layer beside each other.
        extra: for each layer, of its units; as many, and of the same weights, in all layers.

    Raises:
        ShapeError: extra scores are not one per unit.
    """
    of_layer = scores.shape[0] // len(extra)
    lists: list[list[Tensor]] = [[scores]]
    for each in zip(*extra, strict=True):
        for one in each:
            if one.scores.shape not in ((of_layer, scores.shape[1]), scores.shape[1:]):
                raise ShapeError(
                    f"extra scores are {list(one.scores.shape)}; the units' are {[of_layer, scores.shape[1]]}"
                )
        lists.append([one.scores.expand(of_layer, -1) for one in each])
    fusion = ReciprocalRank(weights=(1.0, *(each.weight for each in extra[0])))
    return fusion.fuse([torch.cat(each) for each in lists])


def _ranks(scores: Tensor) -> Tensor:
    """Places from 0 on, `[num_partitions, num_units]` int64, the largest score first; equals share their last one.

    A retriever that knows whole screens or pages scores all units of one alike: which of them counts is for the other
    views to say, not for the order in which they came. The last place, for what is alike in most units says nothing.
    """
    ordered, order = scores.sort(dim=1)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    num_smaller = places.where(is_new, torch.zeros_like(places)).cummax(dim=1).values
    return torch.empty_like(order).scatter_(1, order, scores.shape[1] - 1 - num_smaller)


def _standardised(scores: Tensor, share: float) -> Tensor:
    if scores.shape[1] == 0:
        return scores
    known = scores.isfinite()
    if not known.all():  # of no known score: all are last alike
        lowest = scores.masked_fill(~known, float("inf")).amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
        scores = torch.where(known, scores, lowest)
    centred = scores - scores.mean(dim=1, keepdim=True)
    if share:
        alone = share * centred
        centred[:, 1:] += alone[:, :-1]
        centred[:, :-1] += alone[:, 1:]
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    return centred / deviation.clamp_min(torch.finfo(scores.dtype).tiny)
