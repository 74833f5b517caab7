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
from kvstore.retrieval.selectors.budget import SharingSelector
from kvstore.retrieval.tokens import LayerQuery, Space
from kvstore.retrieval.triggers.trigger import Choice
from kvstore.session.recall import Speculation
from kvstore.session.stream_memory import StreamMemory
from kvstore.session.view import StreamView
from kvstore.spec import BlockKey
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
    extra_at: int = -1


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
    _asking: dict[int, LayerQuery] = field(init=False, default_factory=dict)
    _asked_at: Tensor | None = field(init=False, default=None)
    _turns: dict[tuple[Space, ...], Tensor | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._firsts = self.entries.first_tokens
        self._layers = [_Layer() for _ in range(self.view.num_layers)]

    def choose(self, layer: int, query: Tensor, positions: Tensor, is_first: bool) -> Selection | None:
        """Say what a forward reads in one layer.

        Args:
            layer: layer index; layer 0 comes first.
            query: [num_heads, num_new, key_dim], before RoPE unless the stream's keys are rotated.
            positions: [rows, num_new] int64: where the queries would stand behind the whole stream.
            is_first: whether this forward begins the question.

        Returns:
            The tokens; None to go on with those of the last time.
        """
        if layer == 0:
            self._asking.clear()  # of a forward that failed midway
        state, policy = self._layers[layer], self.policy
        newest = query[:, -1].detach().float()
        if is_first or state.asked_by is None:
            state.step, state.waiting, choice = 0, None, Choice.SELECT
            state.is_full = layer < policy.full_layers and self._fits()
        elif state.is_full:
            choice = Choice.KEEP
        else:
            state.step += 1
            choice = policy.trigger.choose(state.step, newest, state.asked_by)
        if choice is Choice.KEEP:
            return self._take_waiting(layer)
        state.asked_by = newest.clone()  # a view would hold the prompt's queries, of every layer
        if state.is_full:
            state.selection = None  # of an earlier pass, for which there was no room: `share` is for the others
            everything = torch.arange(self._first, max(self._first, self._end))
            return Selection((everything,), (), torch.empty(1, 0, dtype=torch.bool), torch.empty(1, 0))
        view = self.view
        grouped = query.reshape(view.header.spec.kv_heads, -1, *query.shape[1:])
        if layer == 0 or positions is not self._asked_at:
            self._asked_at, self._turns = positions, {}
        asking = LayerQuery(grouped, positions, view.rotate, view.config.window_tokens, self._turns)
        if choice is Choice.SELECT_NEXT:
            self._asking[layer] = asking
            return self._take_waiting(layer)
        made = self.memory.select(layer, asking, view.config.budget_tokens, self._end, self._extra(layer))
        had, state.selection, state.waiting = state.selection, made, None
        return None if _are_equal(made, had) and not is_first else made

    def look_ahead(self) -> None:
        """At the end of a forward: select for the next one, together in all layers that are to."""
        if not self._asking:
            return
        layers, asking = list(self._asking), LayerQuery.joined(list(self._asking.values()))
        self._asking.clear()
        extra = [self._extra(layer) for layer in layers]
        chosen = self.memory.select_together(layers, asking, self.view.config.budget_tokens, self._end, extra)
        for layer, made in zip(layers, chosen, strict=True):
            state = self._layers[layer]
            self._note(state.selection, made)
            state.waiting = None if _are_equal(made, state.selection) else made
        self._prefetch(layers, chosen)

    def waiting(self) -> dict[int, Selection]:
        """By layer, what was selected ahead and differs from what the layer attends to; none that is estimated."""
        return {
            layer: state.waiting
            for layer, state in enumerate(self._layers)
            if state.waiting is not None and state.waiting.estimate is None
        }

    def take(self, layer: int) -> None:
        """Note that a layer attends to what waited for it."""
        self._take_waiting(layer)

    def share(self) -> dict[int, Selection]:
        """Let the layers that chose by themselves choose anew, of one budget; what each reads now.

        Nothing where the policy gives each layer its own, and none of layers that read everything.
        """
        selector = self.policy.selector
        made = {layer: state.selection for layer, state in enumerate(self._layers) if state.selection is not None}
        if not isinstance(selector, SharingSelector) or not made:
            return {}
        shared = self.memory.share_budget(made, selector, self.view.config.budget_tokens, self._end)
        for layer, selection in shared.items():
            self._layers[layer].selection = selection
        return shared

    @contextmanager
    def being_read(self, layers: Sequence[int]) -> Iterator[None]:
        """Around the reading of what layers chose: if it fails, the next forward chooses anew."""
        try:
            yield
        except BaseException:
            for layer in layers:
                self._layers[layer] = _Layer()
            raise

    def _take_waiting(self, layer: int) -> Selection | None:
        """What was selected ahead for this forward; None where that is nothing new."""
        state = self._layers[layer]
        had, state.waiting = state.waiting, None
        if had is not None:
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

    def _extra(self, layer: int) -> list[ExtraScores]:
        """What other retrievers think of a layer's units."""
        state = self._layers[layer]
        extra = state.extra
        if extra is None or state.extra_at != self.memory.num_changes:  # units are others now
            scores = [
                (self.memory.unit_scores(layer, each.scores, self._firsts), each.weight) for each in self.external
            ]
            extra = state.extra = [ExtraScores(*each) for each in scores]
            state.extra_at = self.memory.num_changes
        return extra

    def _note(self, had: Selection | None, made: Selection) -> None:
        self.speculation.num_chosen += sum(units.shape[0] for units in made.units)
        if had is not None:  # since then, the stream may have grown
            num_units = min(had.chosen.shape[1], made.chosen.shape[1])
            self.speculation.num_had += int((had.chosen[:, :num_units] & made.chosen[:, :num_units]).sum())

    def _prefetch(self, layers: Sequence[int], chosen: Sequence[Selection]) -> None:
        """Have blocks brought to memory before they are read, as far as the device has them not."""
        lists = [torch.cat(made.tokens) for made in chosen]
        block = torch.searchsorted(self._firsts, torch.cat(lists), right=True) - 1
        missing: dict[BlockKey, None] = {}
        for layer, of_layer in zip(layers, block.split([each.shape[0] for each in lists]), strict=True):
            keys = [self.entries[number].key for number in of_layer.unique().tolist()]
            missing.update(dict.fromkeys(self.view.residency.missing(keys, layer)))
        if missing:
            self.view.store.prefetch(list(missing))


def _are_equal(made: Selection, had: Selection | None) -> bool:
    return (
        had is not None
        and made.estimate is None
        and len(made.tokens) == len(had.tokens)
        and all(torch.equal(new, old) for new, old in zip(made.tokens, had.tokens, strict=True))
    )
