# SPDX-License-Identifier: Apache-2.0
"""The memory of one layer: cuts what leaves the window into units, looks at them, and selects for a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.retrieval.estimates import Estimate, EstimateTable
from kvstore.retrieval.fusion import ExtraScores, with_extra
from kvstore.retrieval.index.partitions import MatrixIndex, PartitionedIndex
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.selectors.budget import LayeredSelector, TokenBudget
from kvstore.retrieval.tokens import LayerQuery, LayerTokens
from kvstore.retrieval.unit_choice import choose
from kvstore.retrieval.unit_question import UnitQuestions
from kvstore.retrieval.unit_table import UnitTable, list_rows
from kvstore.retrieval.units import Units
from kvstore.retrieval.view import Pool

MakeIndex = Callable[[int, int], PartitionedIndex]
"""Makes an index of so many partitions and so wide."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What one layer reads.

    Args:
        tokens: numbers of the tokens, ascending: one tensor `[num_chosen]` int64 for all KV heads, or one for each.
        units: the units that hold them, likewise: numbers in the order in which they were cut.
        chosen: [partitions, num_units] bool: the same as marks.
        scores: [partitions, num_units] float32: the fused scores; -inf for what could not be chosen.
        estimated: units whose attention is to be estimated, one tensor per KV head; none when empty.
        estimate: what it is to be estimated from; None where nothing is.
    """

    tokens: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    chosen: Tensor
    scores: Tensor
    estimated: tuple[Tensor, ...] = ()
    estimate: Estimate | None = None


class LayerMemory:
    """What one layer can select from. Not thread-safe.

    Where units end depends on the tokens alone: what is pending can be looked at before it is cut (`show_pending`).

    Args:
        policy: says how; it has views.
        kv_heads: of the model.
        key_dim: elements of a key.
        make_index: holds the summaries; the exact one by default.
        layer: which one it is, for selectors that ask.
        table: that of another layer, which is given the same tokens first, where all layers are cut alike.
    """

    def __init__(
        self,
        policy: Policy,
        kv_heads: int,
        key_dim: int,
        make_index: MakeIndex = MatrixIndex,
        layer: int = 0,
        table: UnitTable | None = None,
    ) -> None:
        assert policy.segmenter is not None, "a policy without units needs no memory"
        self.policy = policy
        selector = policy.selector
        self.selector = selector.in_layer(layer) if isinstance(selector, LayeredSelector) else selector
        self._questions = UnitQuestions(policy, self.selector)
        self._segmenter = policy.segmenter
        self._key_dim = key_dim
        self.scale = key_dim**-0.5
        self.kv_heads = kv_heads
        self.indices = [make_index(kv_heads, view.summariser.width(key_dim)) for view in policy.views]
        self.estimates = EstimateTable(kv_heads, key_dim) if policy.estimated_share else None
        self._pending: LayerTokens | None = None
        self._shown: list[MatrixIndex] = []
        """By view, summaries of what is pending, if it is shown; its units are the last ones of the tables then."""
        self._next: int | None = None
        self.has_own_table = table is None
        self.table = UnitTable(kv_heads) if table is None else table

    @property
    def num_tokens(self) -> int:
        """Tokens in units; what was added behind them is pending."""
        return self.table.num_tokens - (self.num_pending if self._shown else 0)

    @property
    def num_pending(self) -> int:
        """Tokens that are in no unit yet: nothing selects them, so whoever added them attends to them himself."""
        return self._pending.num_tokens if self._pending else 0

    @property
    def next_token(self) -> int | None:
        """Number of the token that follows what was added; None where nothing was."""
        return self._next

    @property
    def num_units(self) -> int:
        """Units that are cut for good."""
        return self.indices[0].num_rows

    def go_on_at(self, token: int) -> None:
        """Note that units were put in from elsewhere, up to this token; nothing is pending."""
        self._next = token

    def add(self, tokens: LayerTokens, *, is_end: bool = False) -> None:
        """Take in the next tokens of the stream.

        Args:
            tokens: any number of them; what the segmenter leaves is kept until more come.
            is_end: cut all there is, as `close` does.

        Raises:
            ShapeError: they do not follow those that are pending.
            ConfigError: keys are stored rotated, and a view compares them before RoPE.
        """
        self.hide_pending()
        if self._pending:
            if tokens.first != self._pending.first + self._pending.num_tokens:
                raise ShapeError(
                    f"tokens from {tokens.first} on do not follow {self._pending.first + self._pending.num_tokens - 1}"
                )
            tokens = self._pending.followed_by(tokens)
        self._next = tokens.first + tokens.num_tokens
        self._cut(tokens, is_end=is_end)

    def close(self) -> None:
        """Cut all that is pending into units: what follows, if anything, is parted from it."""
        self.hide_pending()
        if self._pending:
            self._cut(self._pending, is_end=True)

    def show_pending(self) -> None:
        """Let questions choose from what is pending, as if nothing followed, until more comes."""
        if self._pending and not self._shown:
            units = tuple(self._segmenter.cut(self._pending, is_end=True))
            shown = [MatrixIndex(self.kv_heads, view.summariser.width(self._key_dim)) for view in self.policy.views]
            self._index(self._pending, units, shown)
            self._shown = shown

    def hide_pending(self) -> None:
        """Undo `show_pending`."""
        self._shown = []
        num_units = self.num_units
        if self.has_own_table:
            self.table.cut_back(num_units)
        if self.estimates is not None:
            self.estimates.cut_back(num_units)

    def _cut(self, tokens: LayerTokens, *, is_end: bool) -> None:
        units = tuple(self._segmenter.cut(tokens, is_end=is_end))
        taken = units[0].num_tokens
        rest = tokens.part(taken, tokens.num_tokens)
        if taken:
            self._index(tokens.part(0, taken), units, self.indices)
            rest = rest.copied()  # a part would hold the memory of all: that of a batch of blocks in all layers
        self._pending = rest if rest.num_tokens else None

    def select(
        self, query: LayerQuery, budget_tokens: int, end: int | None = None, extra: Sequence[ExtraScores] = ()
    ) -> Selection:
        """Choose what to read for a forward.

        Args:
            query: its queries.
            budget_tokens: most tokens to read, per KV head.
            end: tokens from here on are not chosen: they are attended to anyway. Of a unit on both sides, a page that
                begins before the recent window or a cluster, what comes before is; such a unit is never estimated, for
                its mean holds both. None for all.
            extra: scores of other retrievers, fused with the policy's own by reciprocal rank.

        Raises:
            ShapeError: extra scores are not one per unit.
        """
        if not extra:
            indices = [(index, *self._shown[number : number + 1]) for number, index in enumerate(self.indices)]
            native = self._questions.choose(indices, self.table, query, end, budget_tokens)
            if native is not None:
                return Selection(native.tokens, native.units, native.marks, native.scores)
        return select_together([self], query, budget_tokens, end, [extra])[0]

    def score(self, query: LayerQuery) -> Tensor:
        """Fused scores of all units: `[kv_heads, num_units]`, or `[1, num_units]` where heads select together."""
        return self.policy.fusion.fuse(_view_scores([self], query))

    def scores_in_view(self, number: int, lifted: Tensor) -> Tensor:
        """Inner products of what asks in a view, by its number, with all units; see `PartitionedIndex.scores`."""
        found = self.indices[number].scores(lifted)
        return torch.cat([found, self._shown[number].scores(lifted)], dim=2) if self._shown else found

    def _index(self, tokens: LayerTokens, units: tuple[Units, ...], indices: Sequence[PartitionedIndex]) -> None:
        for view, index in zip(self.policy.views, indices, strict=True):
            index.add(view.summaries(tokens, units))
        if self.estimates is not None:
            self.estimates.add(tokens, units)
        if self.has_own_table:
            self.table.add(units)

    def estimate(self, scores: Tensor, chosen: Tensor, is_cut: Tensor) -> tuple[tuple[Tensor, ...], Estimate | None]:
        """Units next in order, whose attention is to be estimated, and what from; none that are read or cut short."""
        if self.estimates is None:
            return (), None
        units = self._next_best(scores.masked_fill(chosen | is_cut, float("-inf")))
        return units, self.estimates.of(units) if any(each.shape[0] for each in units) else None

    def _next_best(self, scores: Tensor) -> tuple[Tensor, ...]:
        count = min(round(self.policy.estimated_share * scores.shape[1]), scores.shape[1])
        best = scores.topk(count, dim=1)
        found = [row[value.isfinite()].sort().values for row, value in zip(best.indices, best.values, strict=True)]
        return tuple(found) if len(found) == self.kv_heads else tuple(found * self.kv_heads)


def select_together(
    memories: Sequence[LayerMemory],
    query: LayerQuery,
    budget_tokens: int,
    end: int | None = None,
    extra: Sequence[Sequence[ExtraScores]] = (),
) -> list[Selection]:
    """Choose what several layers read, which takes little more than what one does; see `LayerMemory.select`.

    Args:
        memories: of the layers; one policy, and equally many units.
        query: their queries: the KV heads of all layers, one layer behind the other.
        budget_tokens: per KV head.
        end: see `LayerMemory.select`.
        extra: likewise, for each layer.

    Raises:
        ShapeError: extra scores are not one per unit.
    """
    first, count = memories[0], len(memories)
    views = _view_scores(memories, query)
    is_one_table = first.table.has_one_list and all(memory.table is first.table for memory in memories)
    if is_one_table and not any(extra) and first.policy.estimated_share == 0:
        native = choose(first.policy.fusion, first.selector, views, first.table, end, budget_tokens)
        if native is not None:
            of_layer = native.scores.shape[0] // count
            layers = [slice(start, start + of_layer) for start in range(0, native.scores.shape[0], of_layer)]
            return [
                Selection(native.tokens[part], native.units[part], native.marks[part], native.scores[part])
                for part in layers
            ]
    scores = first.policy.fusion.fuse(views)
    if any(extra):
        scores = with_extra(scores, extra)
    of_layer = scores.shape[0] // count
    whole = list_rows([memory.table.sizes for memory in memories], of_layer)
    sizes = whole
    if end is not None:
        sizes = list_rows([memory.table.sizes_before(end) for memory in memories], of_layer)
    scores = scores.masked_fill(sizes == 0, float("-inf"))
    usable = sizes.where(sizes > 0, whole).expand_as(scores)
    if isinstance(first.selector, TokenBudget):  # each list by itself: so all of them at once
        chosen = first.selector.select(scores, usable, budget_tokens)
    else:
        lists = zip(memories, scores.split(of_layer), usable.split(of_layer), strict=True)
        chosen = torch.cat([memory.selector.select(of, fit, budget_tokens) for memory, of, fit in lists])
    units = chosen.nonzero()[:, 1].split(chosen.sum(dim=1).tolist())
    parts = [slice(start, start + of_layer) for start in range(0, scores.shape[0], of_layer)]
    if is_one_table:
        found = first.table.tokens_of(units, end)
        tokens = [found[part] for part in parts]
    else:
        tokens = [memory.table.tokens_of(units[part], end) for memory, part in zip(memories, parts, strict=True)]
    is_cut = (sizes < whole).expand_as(scores)
    made = []
    for memory, part, read in zip(memories, parts, tokens, strict=True):
        estimated, estimate = memory.estimate(scores[part], chosen[part], is_cut[part])
        made.append(Selection(read, units[part], chosen[part], scores[part], estimated, estimate))
    return made


def _view_scores(memories: Sequence[LayerMemory], query: LayerQuery) -> list[Tensor]:
    """Scores of all units by view: `[layers * kv_heads, num_units]`, or `[layers, num_units]` where heads agree."""
    policy, count = memories[0].policy, len(memories)
    scores = []
    for number, view in enumerate(policy.views):
        num_asking = query.query.shape[2] if view.pool is Pool.EACH else 1
        lifted = view.lifted(query)
        asking = lifted.chunk(count) if count > 1 else (lifted,)
        parts = [memory.scores_in_view(number, part) for memory, part in zip(memories, asking, strict=True)]
        met = parts[0] if count == 1 else torch.cat(parts)
        scores.append(view.agree(met, num_asking, memories[0].scale, count))
    if count > 1 and len({each.shape[0] for each in scores}) > 1:  # a layer's list counts for each of its heads
        most = max(each.shape[0] for each in scores)
        scores = [each.repeat_interleave(most // each.shape[0], dim=0) for each in scores]
    return scores
