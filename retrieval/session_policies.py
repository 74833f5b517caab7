# SPDX-License-Identifier: Apache-2.0
"""Policies by name: each is one composition of what is searched, a scope, a position rule and a trigger."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvstore.errors import ConfigError
from kvstore.retrieval.positions import PositionPolicy


class Searched(StrEnum):
    """What a question is compared with: stored summaries of each block in every layer, or the block's own keys.

    MEAN_KEY: the mean of the block's keys.
    RECEIVED_KEY: the mean of the keys that received most attention.
    TOKEN_KEY: every key of the block in a few layers, read from its record.
    """

    MEAN_KEY = "mean_key"
    RECEIVED_KEY = "received_key"
    TOKEN_KEY = "token_key"


class Scope(StrEnum):
    """Which layers share a selection: each its own, or one list for all."""

    LAYER = "layer"
    STREAM = "stream"


class Trigger(StrEnum):
    """When blocks are selected: once per question, or at every forward."""

    QUESTION = "question"
    STEP = "step"


@dataclass(frozen=True, slots=True)
class Policy:
    """One row of the table below.

    Args:
        name: what users type.
        searched: see `Searched`; None retrieves nothing.
        scope: see `Scope`.
        position: where the selected blocks are placed.
        trigger: when a question selects.
        retrieves_while_appending: whether a forward that appends also looks beyond its window.
        recent_tokens: tokens of the stream's end that a question always attends to.
        source: the paper, or our own measurement.

    Raises:
        ConfigError: the parts do not fit each other.
    """

    name: str
    searched: Searched | None
    scope: Scope
    position: PositionPolicy
    trigger: Trigger
    retrieves_while_appending: bool
    recent_tokens: int
    source: str

    def __post_init__(self) -> None:
        if self.scope is Scope.STREAM and self.trigger is Trigger.STEP:
            raise ConfigError(f"policy {self.name}: one list for all layers needs a pass of its own, not every step")
        if self.searched is Searched.TOKEN_KEY and self.scope is Scope.LAYER:
            raise ConfigError(
                f"policy {self.name}: token keys are compared in a few layers only, so the scope is the stream"
            )
        if self.recent_tokens < 0:
            raise ConfigError(f"policy {self.name}: recent_tokens is {self.recent_tokens}; it must not be negative")


_TABLE = (
    Policy(
        name="maxsim",
        searched=Searched.TOKEN_KEY,
        scope=Scope.STREAM,
        position=PositionPolicy.CONSECUTIVE,
        trigger=Trigger.QUESTION,
        retrieves_while_appending=False,
        recent_tokens=0,
        source="late interaction (ColBERT, arXiv:2004.12832) between the keys of question and block; docs/retrieval.md",
    ),
    Policy(
        name="rekv",
        searched=Searched.MEAN_KEY,
        scope=Scope.LAYER,
        position=PositionPolicy.CONSECUTIVE,
        trigger=Trigger.QUESTION,
        retrieves_while_appending=False,
        recent_tokens=0,
        source="ReKV, arXiv:2503.00540",
    ),
    Policy(
        name="infllm",
        searched=Searched.RECEIVED_KEY,
        scope=Scope.LAYER,
        position=PositionPolicy.CONSTANT_FAR,
        trigger=Trigger.STEP,
        retrieves_while_appending=True,
        recent_tokens=512,
        source="InfLLM, arXiv:2402.04617",
    ),
    Policy(
        name="streaming_llm",
        searched=None,
        scope=Scope.STREAM,
        position=PositionPolicy.CONSECUTIVE,
        trigger=Trigger.QUESTION,
        retrieves_while_appending=False,
        recent_tokens=512,
        source="StreamingLLM, arXiv:2309.17453",
    ),
)
POLICIES = {policy.name: policy for policy in _TABLE}
DEFAULT_POLICY = "maxsim"


def policy_named(name: str) -> Policy:
    """Look a policy up; `auto` is the default one.

    Raises:
        ConfigError: no such policy; the message lists them.
    """
    try:
        return POLICIES[DEFAULT_POLICY if name == "auto" else name]
    except KeyError:
        raise ConfigError(f"no policy named {name!r}; use auto or one of {sorted(POLICIES)}") from None
