# SPDX-License-Identifier: Apache-2.0
"""A policy: a named composition of strategies. What does not fit together is refused when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvstore.errors import ConfigError
from kvstore.retrieval.fusion import Fusion, ReciprocalRank
from kvstore.retrieval.maxsim import LateInteraction
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.retention.thinning import Thinning
from kvstore.retrieval.selectors.budget import Selector, SharingSelector, TokenBudget
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import OncePerQuestion, Trigger
from kvstore.retrieval.units import Segmenter
from kvstore.retrieval.view import View


@dataclass(frozen=True, slots=True)
class Policy:
    """What of a stream is read, when, and where it is placed.

    Args:
        name: what users type.
        source: the paper, or our own measurement.
        segmenter: how tokens are cut into units; None for a policy that retrieves nothing.
        views: how units are looked at; several are fused.
        late: ranks whole blocks for all layers instead, by a pass over the question.
        fusion: of the views.
        selector: which units a score earns a place.
        trigger: when units are selected anew.
        position: where they are placed.
        context_temperature: divides the logits of retrieved tokens; sinks, window and new tokens keep theirs. 1 is
            plain attention (APE, arXiv:2502.05431).
        context_scale: multiplies their joint log-sum-exp, as the temperature does; the rule for both is in
            `kvstore.kernels.parts_reference.context_part`. 1 is plain attention.
        retention: how what is appended is thinned before it is stored; None keeps everything.
        estimated_share: of the units, those next in order whose attention is estimated from their mean key and the sum
            of their values instead of read (RetroInfer, arXiv:2505.02922).
        full_layers: first layers that attend to everything, because attention is not sparse there.
        recent_tokens: tokens of the stream's end that a question always attends to.
        retrieves_while_appending: whether a forward that appends also looks beyond its window.
        beyond: what takes its place once a stream is longer than the model was trained for, where original positions
            mean nothing to it; None keeps to this one.

    Raises:
        ConfigError: the parts do not fit each other.
    """

    name: str
    source: str
    segmenter: Segmenter | None = None
    views: tuple[View, ...] = ()
    late: LateInteraction | None = None
    fusion: Fusion = field(default_factory=ReciprocalRank)
    selector: Selector = field(default_factory=TokenBudget)
    trigger: Trigger = field(default_factory=OncePerQuestion)
    position: PositionPolicy = PositionPolicy.ORIGINAL
    context_temperature: float = 1.0
    context_scale: float = 1.0
    retention: Thinning | None = None
    estimated_share: float = 0.0
    full_layers: int = 0
    recent_tokens: int = 0
    retrieves_while_appending: bool = False
    beyond: Policy | None = None

    def __post_init__(self) -> None:
        if (self.segmenter is None) != (not self.views):
            raise ConfigError(f"policy {self.name}: it has units without views of them, or views without units")
        if self.late is not None and (self.views or not isinstance(self.trigger, OncePerQuestion)):
            raise ConfigError(
                f"policy {self.name}: one ranking for all layers needs a pass over the question: it goes with neither "
                "views nor another trigger than once per question"
            )
        if self.shares_layers and (self.retrieves_while_appending or not isinstance(self.trigger, OncePerQuestion)):
            raise ConfigError(
                f"policy {self.name}: one budget for all layers needs a pass over the question: it goes with no other "
                "trigger than once per question, and not with appending"
            )
        if self.late is not None and self.retrieves_while_appending:
            raise ConfigError(f"policy {self.name}: what is appended asks no question to rank blocks by")
        is_moved = self.position is not PositionPolicy.ORIGINAL
        if is_moved and any(view.space is Space.ROTATED for view in self.views):
            raise ConfigError(
                f"policy {self.name}: it scores keys at their original positions and reads them at others "
                f"({self.position}), where attention is not what the score says; compare them in the plain space, or "
                "leave them where they are"
            )
        if self.estimated_share and is_moved:
            raise ConfigError(f"policy {self.name}: attention is estimated at original positions, not {self.position}")
        for name in ("context_temperature", "context_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"policy {self.name}: {name} is {getattr(self, name)}; it must be positive")
        if self.context_temperature != 1 or self.context_scale != 1:
            is_far = self.position is PositionPolicy.CONSTANT_FAR
            if is_far or self.estimated_share or self.retrieves_while_appending:
                raise ConfigError(
                    f"policy {self.name}: a temperature of the context goes neither with one far distance, nor with "
                    "estimates, nor with appending"
                )
        if not 0 <= self.estimated_share < 1:
            raise ConfigError(f"policy {self.name}: estimated_share is {self.estimated_share}; it must be 0 to below 1")
        if self.beyond is not None and (self.retrieves_while_appending or self.beyond.retrieves_while_appending):
            raise ConfigError(f"policy {self.name}: what is appended must not depend on the stream's length")
        if self.beyond is not None and self.beyond.retention is not None:
            raise ConfigError(f"policy {self.name}: what is kept must not depend on the stream's length")
        for name in ("full_layers", "recent_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy {self.name}: {name} is {getattr(self, name)}; it must not be negative")

    @property
    def shares_layers(self) -> bool:
        """Whether layers share one budget."""
        return isinstance(self.selector, SharingSelector)

    @property
    def retrieves(self) -> bool:
        """Whether it looks beyond sinks and window at all."""
        return self.late is not None or bool(self.views)
