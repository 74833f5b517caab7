# SPDX-License-Identifier: Apache-2.0
"""Streams that were read apart and are asked about together, as users see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import torch

from kvstore.errors import ConfigError, ReadOnlyError
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.tokens import Rotate
from kvstore.session.contexts.session import ContextsSession
from kvstore.session.contexts.view import ContextsView
from kvstore.session.session import Session
from kvstore.session.stream import Stream
from kvstore.session.view import SessionConfig
from kvstore.store import Store
from kvstore.tiers.manifest import StreamHeader

_PLACES = (PositionPolicy.PARALLEL, PositionPolicy.CONSECUTIVE)


class Contexts(Stream):
    """Several streams under one question: `attach` takes it like a stream that is read only.

    A question attends to what all of them begin with, then to all of them: placed over each other, as in APE
    (arXiv:2502.05431), or one behind the other, as in Block-Attention (arXiv:2409.15355). None was computed from
    another, and none is computed again.

    Args:
        store: the block store.
        headers: of the streams, by the order in which they are attended: one model, one block size, one prefill.
        config: see `SessionConfig`; of the policy, places and recent tokens do not count.
        placed: `parallel` or `consecutive`.
        is_whole: read all of them; else the policy chooses within the budget.

    Raises:
        ConfigError: no stream, or one named twice; streams that were written with other settings; a policy that
            chooses nothing and should; no such place.
    """

    def __init__(
        self, store: Store, headers: Sequence[StreamHeader], config: SessionConfig, placed: str, is_whole: bool
    ) -> None:
        names = [header.name for header in headers]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"contexts {names}: name at least one stream, and each once")
        if placed not in _PLACES:
            raise ConfigError(f"contexts are placed {placed!r}; use one of {[str(place) for place in _PLACES]}")
        for header in headers[1:]:
            if header.prefill != headers[0].prefill:
                raise ConfigError(
                    f"contexts {names[0]!r} and {header.name!r} were written with other settings, "
                    f"{headers[0].prefill} and {header.prefill}: ask them apart, or write one of them again"
                )
        super().__init__(store, headers[0], replace(config, policy=_reading(config.policy, is_whole)))
        self._headers = tuple(headers)
        self._placed = PositionPolicy(placed)
        self._is_whole = is_whole

    @property
    def lost(self) -> Mapping[str, Sequence[str]]:
        """By stream, why blocks of it were missing in the last question."""
        view = self._session.view if self._session is not None else None
        found: dict[str, list[str]] = {}
        for key, reason in self.last.load.lost.items():
            origin = view.origin_of(key) if isinstance(view, ContextsView) else None
            if origin is not None:
                found.setdefault(origin.stream, []).append(f"block {origin.entry.index}: {reason}")
        return found

    def bind(self, rotate: Rotate | None, device: torch.device, rows: int = 1, trained_tokens: int = 0) -> Session:
        """Give the contexts their rotary function and device; see `Stream.bind`."""
        if self._session is None:
            config = replace(self._config, trained_tokens=trained_tokens)
            self._session = ContextsSession(
                ContextsView(self._store, self._headers, config, self._placed, self._is_whole, rotate, device, rows)
            )
        return self._session

    def commit(self) -> None:
        """Do nothing: nothing is appended."""

    def fork(self, name: str, at: int | None = None) -> NoReturn:
        """Refused: fork one of the streams; raises `ReadOnlyError`."""
        raise ReadOnlyError("contexts are no stream of their own; fork one of theirs")

    def rollback(self, at: int) -> NoReturn:
        """Refused: roll back one of the streams; raises `ReadOnlyError`."""
        raise ReadOnlyError("contexts are no stream of their own; roll back one of theirs")


def _reading(policy: Policy, is_whole: bool) -> Policy:
    """A policy over blocks that have their places: its search, its temperature and its scale."""
    if not is_whole and not policy.retrieves:
        raise ConfigError(f"policy {policy.name} chooses nothing of contexts; use another, or no budget")
    policy = replace(
        policy,
        position=PositionPolicy.ORIGINAL,
        recent_tokens=0,
        retrieves_while_appending=False,
        beyond=None,
    )
    if is_whole:
        return replace(policy, segmenter=None, views=(), late=None, estimated_share=0.0)
    return policy
