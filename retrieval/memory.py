# SPDX-License-Identifier: Apache-2.0
"""The memory of one layer: cuts what leaves the window into units, looks at them, and selects for a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.retrieval.estimates import Estimate, EstimateTable
from kvstore.retrieval.fusion import ExtraScores, ReciprocalRank
from kvstore.retrieval.index.partitions import MatrixIndex, PartitionedIndex
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.selectors.budget import LayeredSelector
from kvstore.retrieval.tokens import LayerQuery, LayerTokens
from kvstore.retrieval.unit_table import UnitTable
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
        scores: [partitions, num_units] float32: the fused scores; -inf for what could not be chosen.
        estimated: units whose attention is to be estimated, one tensor per KV head; none when empty.
        estimate: what it is to be estimated from; None where nothing is.
    """

    tokens: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    scores: Tensor
    estimated: tuple[Tensor, ...] = ()
    estimate: Estimate | None = None


class LayerMemory:
    """What one layer can select from. Not thread-safe.

    Args:
        policy: says how; it has views.
        kv_heads: of the model.
        key_dim: elements of a key.
        make_index: holds the summaries; the exact one by default.
        layer: which one it is, for selectors that ask.
    """

    def __init__(
        self, policy: Policy, kv_heads: int, key_dim: int, make_index: MakeIndex = MatrixIndex, layer: int = 0
    ) -> None:
        assert policy.segmenter is not None, "a policy without units needs no memory"
        self._policy = policy
        selector = policy.selector
        self._selector = selector.in_layer(layer) if isinstance(selector, LayeredSelector) else selector
        self._segmenter = policy.segmenter
        self._scale = key_dim**-0.5
        self._kv_heads = kv_heads
        self._indices = [make_index(kv_heads, view.summariser.width(key_dim)) for view in policy.views]
        self._estimates = EstimateTable(kv_heads, key_dim) if policy.estimated_share else None
        self._pending: LayerTokens | None = None
        self.table = UnitTable(kv_heads)

    @property
    def num_tokens(self) -> int:
        """Tokens in units; what was added behind them is pending."""
        return self.table.num_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that are in no unit yet: nothing selects them, so whoever added them attends to them himself."""
        return self._pending.num_tokens if self._pending else 0

    @property
    def next_token(self) -> int | None:
        """Number of the token that follows what is pending; None where nothing is."""
        return self._pending.first + self._pending.num_tokens if self._pending else None

    def add(self, tokens: LayerTokens, *, is_end: bool = False) -> None:
        """Take in the next tokens of the stream.

        Args:
            tokens: any number of them; what the segmenter leaves is kept until more come.
            is_end: cut all there is, as `close` does.

        Raises:
            ShapeError: they do not follow those that are pending.
            ConfigError: keys are stored rotated, and a view compares them before RoPE.
        """
        if self._pending:
            if tokens.first != self._pending.first + self._pending.num_tokens:
                raise ShapeError(
                    f"tokens from {tokens.first} on do not follow {self._pending.first + self._pending.num_tokens - 1}"
                )
            tokens = self._pending.followed_by(tokens)
        self._cut(tokens, is_end=is_end)

    def close(self) -> None:
        """Cut all that is pending into units: what follows, if anything, is parted from it."""
        if self._pending:
            self._cut(self._pending, is_end=True)

    def _cut(self, tokens: LayerTokens, *, is_end: bool) -> None:
        units = tuple(self._segmenter.cut(tokens, is_end=is_end))
        taken = units[0].num_tokens
        rest = tokens.part(taken, tokens.num_tokens)
        if taken:
            self._index(tokens.part(0, taken), units)
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
        scores = self.score(query)
        if extra:
            scores = self._fused(scores, extra)
        whole = self.table.sizes
        sizes = whole if end is None else self.table.sizes_before(end)
        if scores.shape[0] == 1:  # one list: of tables that differ, the largest counts
            sizes, whole = sizes.amax(dim=0, keepdim=True), whole.amax(dim=0, keepdim=True)
        scores = scores.masked_fill(sizes == 0, float("-inf"))
        chosen = self._selector.select(scores, sizes.where(sizes > 0, whole).expand_as(scores), budget_tokens)
        estimated: tuple[Tensor, ...] = ()
        if self._policy.estimated_share:
            estimated = self._next_best(scores.masked_fill(chosen | (sizes < whole), float("-inf")))
        units = tuple(row.nonzero()[:, 0] for row in chosen)
        is_guessed = self._estimates is not None and any(each.shape[0] for each in estimated)
        estimate = self._estimates.of(estimated) if self._estimates is not None and is_guessed else None
        return Selection(self.table.tokens_of(units, end), units, scores, estimated, estimate)

    def score(self, query: LayerQuery) -> Tensor:
        """Fused scores of all units: `[kv_heads, num_units]`, or `[1, num_units]` where heads select together."""
        scores = []
        for view, index in zip(self._policy.views, self._indices, strict=True):
            num_asking = query.query.shape[2] if view.pool is Pool.EACH else 1
            scores.append(view.agree(index.scores(view.lifted(query)), num_asking, self._scale))
        return self._policy.fusion.fuse(scores)

    def _fused(self, scores: Tensor, extra: Sequence[ExtraScores]) -> Tensor:
        for each in extra:
            if each.scores.shape not in (scores.shape, scores.shape[1:]):
                raise ShapeError(f"extra scores are {list(each.scores.shape)}; the units' are {list(scores.shape)}")
        fusion = ReciprocalRank(weights=(1.0, *(each.weight for each in extra)))
        return fusion.fuse([scores, *(each.scores.expand_as(scores) for each in extra)])

    def _index(self, tokens: LayerTokens, units: tuple[Units, ...]) -> None:
        for view, index in zip(self._policy.views, self._indices, strict=True):
            index.add(view.summaries(tokens, units))
        if self._estimates is not None:
            self._estimates.add(tokens, units)
        self.table.add(units)

    def _next_best(self, scores: Tensor) -> tuple[Tensor, ...]:
        count = min(round(self._policy.estimated_share * scores.shape[1]), scores.shape[1])
        best = scores.topk(count, dim=1)
        found = [row[value.isfinite()].sort().values for row, value in zip(best.indices, best.values, strict=True)]
        return tuple(found) if len(found) == self._kv_heads else tuple(found * self._kv_heads)
