# SPDX-License-Identifier: Apache-2.0
"""A question asked of a stream: reads sinks, retrieved blocks and the stream's end, and leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.retrieval.fusion import ExtraScores
from kvstore.retrieval.memory import Selection
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.selection import Ranking, select
from kvstore.session.attending import Attending
from kvstore.session.attention_inputs import AttentionInputs
from kvstore.session.branch_past import BranchPast
from kvstore.session.choosing import LayerChoices
from kvstore.session.late.ranking import LateRanking
from kvstore.session.reading.past import Reading
from kvstore.session.recall import Recall, cite
from kvstore.session.stream_memory import StreamMemory
from kvstore.session.view import StreamView
from kvstore.store import Entry


class _Phase(StrEnum):
    """`SCOUT` collects the question's keys, `RECALL` lets each layer select, `ANSWER` attends to what was selected."""

    SCOUT = "scout"
    RECALL = "recall"
    ANSWER = "answer"


class Branch(BranchPast):
    """One question. Its own tokens live in the contexts only, in any batch size, and are numbered from 0.

    The engine runs the question through the model between `begin_recall` and `end_recall`, then the prompt and the
    answer. Without that first pass, the first forward of the prompt selects by itself where the policy allows it
    (`needs_recall` says where it does not). Of a batch, the first sequence selects for all. A forward that fails midway
    leaves nothing. Not thread-safe: the engine's thread owns it.

    Args:
        view: the stream, as it is now.
        continues: number the question's tokens on from the stream's end, as an engine that counts them all does.
        external: what other retrievers think of the stream's blocks: [num_blocks] float32 each, fused by rank with the
            policy's own scores.
        recent_tokens: of the stream's end, that are read at least; the policy may have more.

    Raises:
        ShapeError: not one external score for each block.
    """

    def __init__(
        self,
        view: StreamView,
        *,
        continues: bool,
        external: Sequence[ExtraScores] = (),
        recent_tokens: int = 0,
    ) -> None:
        super().__init__(view, view.policy, continues=continues, recent_tokens=recent_tokens)
        policy = view.policy
        self.first_token = view.sequence_length if continues else 0
        self._excluded = frozenset((*range(len(self._sinks)), *range(self._recent_first, len(self._entries))))
        self._scout = Attending(view.residency, view.rotate, PositionPolicy.CONSECUTIVE, 0, view.rows)
        self._scout_keys: dict[int, Tensor] = {}
        self.num_spare = 0
        """Last tokens of the coming pass over the question that only fill it up: nothing is retrieved by them."""
        self._search = view.search(policy) if policy.retrieves else None
        self._choices: LayerChoices | None = None
        self._asking_at = torch.empty(0, dtype=torch.int64)
        whole = Reading.of(self._sinks, (), self._recent)
        self._sink_tokens, self._near_tokens = whole.far[0], whole.near
        if isinstance(self._search, StreamMemory):
            self._choices = LayerChoices(view, policy, self._search, self._entries, self._recent_first, external)
        self._external = external
        for each in external:
            if each.scores.shape != (len(self._entries),):
                raise ShapeError(
                    f"external scores are {list(each.scores.shape)}; the stream has {len(self._entries)} blocks"
                )
        self._votes: Counter[int] = Counter()
        self._phase = _Phase.ANSWER
        self._has_selected = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the question and answer so far, without the running forward's."""
        return self.contexts[-1].num_tail

    @property
    def batch(self) -> int:
        """Sequences of the running question."""
        return self.contexts[0].batch

    @property
    def selects_next(self) -> bool:
        """Whether the coming forward is the one that the question retrieves by, if there is anything to choose from."""
        is_to_choose = self._policy.retrieves and len(self._excluded) < len(self._entries)
        return is_to_choose and not self._has_selected and self._phase is _Phase.ANSWER

    @property
    def needs_recall(self) -> bool:
        """Whether a pass over the question must come before the coming forward: layers share a list or a budget."""
        return self.selects_next and (self._choices is None or self._policy.shares_layers)

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """`begin_recall` and `end_recall` around a block; if it fails, the next forward needs a pass again."""
        self.begin_recall()
        try:
            yield
            self.end_recall()
        except BaseException:
            self._has_selected = False
            raise
        finally:
            self._leave_recall()

    def begin_recall(self) -> None:
        """Start the pass over the question: the next forward selects and is then forgotten."""
        self._leave_recall()
        self._refresh()
        self._phase = _Phase.RECALL if self._choices is not None else _Phase.SCOUT
        self._has_selected = False
        self._votes.clear()
        self.recall = Recall()
        if self._phase is _Phase.SCOUT:
            self.attend_to(self._scout, Reading.of(self._sinks, (), ()), range(len(self.contexts)))

    def end_recall(self) -> None:
        """End the pass over the question; for policies with one list, select and load now.

        Raises:
            ConfigError: no question ran through all layers.
        """
        if self._phase is _Phase.SCOUT and len(self._scout_keys) == len(self.contexts):
            self._select_for_all()
            self._has_selected = True
        if not self._has_selected:
            raise ConfigError("nothing to retrieve by: no question ran through all layers of the model")
        self._leave_recall()
        if self._choices is not None:
            for layer, chosen in self._choices.share().items():
                self._attend_to_chosen(layer, chosen)
            self._cite_votes()

    def _leave_recall(self) -> None:
        """Forget the question's tokens, and that a pass was under way."""
        if self._phase is _Phase.ANSWER:
            return
        for context in (*self.contexts, *self._scout.contexts):
            context.drop_tail(context.num_tail)
        self._scout_keys.clear()
        self.num_spare = 0
        self._phase = _Phase.ANSWER

    def extend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> AttentionInputs:
        """Add one layer of a forward's tokens to the question.

        Args:
            layer: layer index; layer 0 comes first.
            query: [batch, num_heads, num_new, key_dim] in the stream's key space.
            keys: [batch, kv_heads, num_new, key_dim].
            values: [batch, kv_heads, num_new, value_dim].
            positions: [rows, batch, num_new] int64, counted from the question's first token.

        Raises:
            ShapeError: a layer out of turn, or tensors that do not fit the model.
            CapacityError: more blocks were chosen than fit the device pool.
        """
        self.check(layer, query, keys, values, positions)
        if layer == 0:
            self._forget_unfinished()
        if self._phase is _Phase.SCOUT:
            self._scout_keys[layer] = keys[0, :, : keys.shape[2] - self.num_spare].detach()
            return self._scout.inputs(layer, query, keys, values, positions)
        if self._choices is not None:
            count = query.shape[2] - self.num_spare
            self._extend_chosen(layer, query[:, :, :count], positions[:, :, :count])
        elif not self._has_selected and layer == 0:  # no pass came before: there was nothing to choose
            self.attend_to(self, Reading.of(self._sinks, (), self._recent), range(len(self.contexts)))
        inputs = self.inputs(layer, query, keys, values, positions)
        if layer == len(self.contexts) - 1:
            self._has_selected = True  # not before: a forward that fails midway has asked for nothing
        return inputs

    def drop(self, num_tokens: int) -> None:
        """Forget the last tokens of the question."""
        self._forget_unfinished()
        for context in self.contexts:
            context.drop_tail(num_tokens)

    def take_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop sequences (beam search)."""
        self._forget_unfinished()
        for context in self.contexts:
            context.take_rows(rows)

    def _forget_unfinished(self) -> None:
        """Drop what a forward that failed midway left in the layers that it reached."""
        for context in self.contexts:
            context.drop_tail(context.num_tail - self.num_tokens)

    # Selecting

    def _choose(self, ranking: Ranking) -> list[Entry]:
        budget_tokens = self._view.config.budget_tokens
        return [self._entries[i] for i in select(ranking, self._entries.sizes, budget_tokens, self._excluded)]

    def _refresh(self) -> None:
        """Take in what was appended since the last question."""
        if self._search is not None:
            self._search.refresh(self._view.num_sink_blocks, self._entries)
        if isinstance(self._search, StreamMemory):
            if self._view.store.is_writable and self._search.is_to_keep(self._entries):
                self._search.keep(self._view.num_sink_blocks, self._entries)
            self._search.show_pending()

    def _select_for_all(self) -> None:
        late = self._search
        if not isinstance(late, LateRanking):  # nothing to choose by
            self.attend_to(self, Reading.of(self._sinks, (), self._recent), range(len(self.contexts)))
            return
        question = torch.stack([self._scout_keys[layer].transpose(0, 1).flatten(1) for layer in late.layers], dim=1)
        ranking = late.rank(question.float().cpu(), len(self._entries))
        ranking = ranking.fused(self._external, len(self._entries))
        chosen = self._choose(ranking)
        reading = Reading.of((*self._sinks, *chosen), (), self._recent)
        attended = self.attend_to(self, reading, range(len(self.contexts)))
        self._prefetch(ranking, chosen)
        self.recall.spans = cite(ranking.pairs(), self._entries, attended)

    def _prefetch(self, ranking: Ranking, chosen: Sequence[Entry]) -> None:
        """Have the next best blocks brought to memory: the next question is often about the same."""
        excluded = self._excluded.union(entry.index for entry in chosen)
        blocks = select(ranking, self._entries.sizes, self._view.config.prefetch_tokens, excluded)
        if blocks:
            self._view.store.prefetch([self._entries[block].key for block in blocks])

    def _extend_chosen(self, layer: int, query: Tensor, positions: Tensor) -> None:
        """Let a layer choose by its queries, if it is time to, and attend to what it chose."""
        choices = self._choices
        assert choices is not None, "asked by the caller"
        if layer == 0:
            if self._phase is _Phase.ANSWER and not self._has_selected:
                self._refresh()
            self._asking_at = positions[:, 0] + self._end - self._tail_start
        is_first = self._phase is _Phase.RECALL or not self._has_selected
        if layer == 0 and not is_first:
            self._read_ahead(choices)
        with choices.being_read([layer]):
            chosen = choices.choose(layer, query[0], self._asking_at, is_first)
            if chosen is not None:
                self._attend_to_chosen(layer, chosen)
        if layer == len(self.contexts) - 1:
            choices.look_ahead()
            self.recall.speculation = choices.speculation
            self._cite_votes()

    def _attend_to_chosen(self, layer: int, chosen: Selection) -> None:
        """Read what a layer chose, and vote for the blocks that it is in."""
        reading = self._reading(chosen)
        had = self.attend_to_differences({layer: reading}).get(layer) if chosen.estimate is None else None
        if had is None:
            had = self.attend_to(self, reading, range(layer, layer + 1), chosen.estimate)
        self._votes.update(had - self._excluded)

    def _read_ahead(self, choices: LayerChoices) -> None:
        """Read what was chosen for this forward in all layers at once, as far as it lies on the device."""
        readings = {layer: self._reading(chosen) for layer, chosen in choices.waiting().items()}
        if len(readings) < 2:
            return
        with choices.being_read(list(readings)):
            found = self.attend_to_differences(readings)
        for layer, blocks in found.items():
            choices.take(layer)
            self._votes.update(blocks - self._excluded)

    def _reading(self, chosen: Selection) -> Reading:
        return Reading(tuple(torch.cat([self._sink_tokens, each]) for each in chosen.tokens), self._near_tokens)

    def _cite_votes(self) -> None:
        num_layers = len(self.contexts)
        scored = [(block, count / num_layers) for block, count in self._votes.most_common()]
        self.recall.spans = cite(scored, self._entries, frozenset(self._votes))
