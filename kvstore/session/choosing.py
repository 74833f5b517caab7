# SPDX-License-Identifier: Apache-2.0
"""Lets each layer of a question choose what it reads: anew, or what it chose before, as the policy's trigger says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvstore.retrieval.fusion import ExtraScores
from kvstore.retrieval.memory import Selection
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.tokens import LayerQuery
from kvstore.retrieval.triggers.trigger import Choice
from kvstore.session.recall import Speculation
from kvstore.session.stream_memory import StreamMemory
from kvstore.session.view import StreamView
from kvstore.store import Entries


@dataclass(slots=True)
class _Layer:
    """What a layer chose: forwards since the first, the query it was chosen by, and a selection that waits."""

    is_full: bool = False
    step: int = 0
    asked_by: Tensor | None = None
    selection: Selection | None = None
    waiting: Selection | None = None
    extra: list[ExtraScores] | None = None


@dataclass(slots=True)
class LayerChoices:
    """The choices of one question.

    Args:
        view: the stream.
        policy: how they are made.
        memory: what there is to choose from.
        entries: its blocks when the question began.
        recent_first: the first block of the recent window, which is read anyway.
        external: scores of all blocks by other retrievers.
    """

    view: StreamView
    policy: Policy
    memory: StreamMemory
    entries: Entries
    recent_first: int
    external: Sequence[ExtraScores] = ()
    speculation: Speculation = field(default_factory=Speculation)
    _layers: list[_Layer] = field(init=False)
    _firsts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._firsts = self.entries.first_tokens
        self._layers = [_Layer() for _ in range(self.view.num_layers)]

    def choose(self, layer: int, query: Tensor, positions: Tensor, is_first: bool) -> Selection | None:
        """Say what a forward reads in one layer.

        Args:
            layer: layer index.
            query: [num_heads, num_new, key_dim], before RoPE unless the stream's keys are rotated.
            positions: [rows, num_new] int64: where the queries would stand behind the whole stream.
            is_first: whether this forward begins the question.

        Returns:
            The tokens; None to go on with those of the last time.
        """
        state, policy = self._layers[layer], self.policy
        newest = query[:, -1].float()
        if is_first or state.asked_by is None:
            state.step, state.waiting, choice = 0, None, Choice.SELECT
            state.is_full = layer < policy.full_layers and self._fits()
        elif state.is_full:
            choice = Choice.KEEP
        else:
            state.step += 1
            choice = policy.trigger.choose(state.step, newest, state.asked_by)
        if choice is Choice.KEEP:
            return self._take_waiting(state)
        state.asked_by = newest
        if state.is_full:
            return Selection((torch.arange(self._first, max(self._first, self._end)),), (), torch.empty(1, 0))
        made = self._select(layer, query, positions)
        if choice is Choice.SELECT:
            had, state.selection, state.waiting = state.selection, made, None
            return None if _are_equal(made, had) and not is_first else made
        had = self._take_waiting(state)
        self._note(state.selection, made)
        self._prefetch(layer, made)
        state.waiting = made
        return had

    @contextmanager
    def being_read(self, layer: int) -> Iterator[None]:
        """Around the reading of what a layer chose: if it fails, the next forward chooses anew."""
        try:
            yield
        except BaseException:
            self._layers[layer] = _Layer()
            raise

    def _take_waiting(self, state: _Layer) -> Selection | None:
        """What was selected ahead for this forward; None where that is nothing new."""
        had, state.waiting = state.waiting, None
        if had is None or _are_equal(had, state.selection):
            return None
        state.selection = had
        return had

    @property
    def _first(self) -> int:
        sinks = self.view.num_sink_blocks
        return self.entries[sinks].first_token if sinks < len(self.entries) else self._end

    @property
    def _end(self) -> int:
        """Number behind the last token that may be chosen."""
        return self.entries[: self.recent_first].end_token

    def _fits(self) -> bool:
        """Whether the device has room for everything; where it has not, the first layers choose like the others."""
        return len(self.entries) <= self.view.residency.num_unpinned

    def _select(self, layer: int, query: Tensor, positions: Tensor) -> Selection:
        view = self.view
        grouped = query.unflatten(0, (view.header.spec.kv_heads, -1))
        asking = LayerQuery(grouped, positions, view.rotate, view.config.window_tokens)
        extra, num_units = self._layers[layer].extra, self.memory.num_units(layer)
        if extra is None or any(each.scores.shape[0] != num_units for each in extra):  # the stream has grown
            scores = [
                (self.memory.unit_scores(layer, each.scores, self._firsts), each.weight) for each in self.external
            ]
            extra = self._layers[layer].extra = [ExtraScores(*each) for each in scores]
        return self.memory.select(layer, asking, view.config.budget_tokens, self._end, extra)

    def _note(self, had: Selection | None, made: Selection) -> None:
        for number, units in enumerate(made.units):
            self.speculation.num_chosen += units.shape[0]
            if had is not None:
                self.speculation.num_had += int(torch.isin(units, had.units[number]).sum())

    def _prefetch(self, layer: int, made: Selection) -> None:
        """Have the blocks of a selection brought to memory before it is read, as far as the device has them not."""
        blocks = (torch.searchsorted(self._firsts, torch.cat(made.tokens), right=True) - 1).unique().tolist()
        missing = self.view.residency.missing([self.entries[block].key for block in blocks], layer)
        if missing:
            self.view.store.prefetch(missing)


def _are_equal(made: Selection, had: Selection | None) -> bool:
    return (
        had is not None
        and made.estimate is None
        and len(made.tokens) == len(had.tokens)
        and all(torch.equal(new, old) for new, old in zip(made.tokens, had.tokens, strict=True))
    )
