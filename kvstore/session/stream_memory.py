# SPDX-License-Identifier: Apache-2.0
"""What a policy can select from in each layer of one stream, made from its stored blocks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError, ShapeError, UnsupportedFormatError
from kvstore.layout import BlockLayout
from kvstore.retrieval.fusion import ExtraScores
from kvstore.retrieval.index.partitions import LARGEST
from kvstore.retrieval.memory import LayerMemory, Selection, select_together
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.segmenters.frames import Frames
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.selectors.budget import SharingSelector
from kvstore.retrieval.shared_budget import share_budget
from kvstore.retrieval.summary import received_of
from kvstore.retrieval.tokens import LayerQuery, LayerTokens, Rotate
from kvstore.session.kept_views import LEAST_TOKENS, KeptViews, make_index
from kvstore.store import Entry, FetchRequest, Store, StreamHeader

_BATCH = 16
_CUT_ALIKE = (Pages, Frames)
"""Segmenters that look at no keys: all layers have the same units."""

PositionsOf = Callable[[Entry], Tensor]
"""RoPE positions of a block: `[rows, num_tokens]` int64; raises `CorruptRecordError`."""


@dataclass(frozen=True, slots=True)
class _Block:
    entry: Entry
    keys: Tensor
    values: Tensor
    positions: Tensor
    received: Tensor


class StreamMemory:
    """Selects tokens of one stream, layer by layer; made on first use and extended later.

    A block that cannot be read is not found, which is no error: `damaged` says why, by the block's index.

    Args:
        store: the open store.
        header: the stream's header.
        policy: how; it has views.
        rotate: the model's rotary function; None where keys are stored rotated.
        positions: of blocks.
    """

    def __init__(
        self, store: Store, header: StreamHeader, policy: Policy, rotate: Rotate | None, positions: PositionsOf
    ) -> None:
        self._store = store
        self._header = header
        self._rotate = rotate
        self._positions = positions
        self._layout = BlockLayout(header.spec, header.block_tokens)
        self._policy = policy
        self._num_kept_tokens = 0
        self._is_torn = False
        self.num_changes = 0
        """Grows whenever units may be others than before."""
        self._begin()

    def _begin(self) -> None:
        spec = self._header.spec
        self._layers: list[LayerMemory] = []
        for layer in range(spec.num_layers):
            table = self._layers[0].table if layer and isinstance(self._policy.segmenter, _CUT_ALIKE) else None
            self._layers.append(LayerMemory(self._policy, spec.kv_heads, spec.key_dim, make_index, layer, table))
        self._kept = KeptViews(self._store, self._header.name, self._policy)
        self._known = 0
        self.damaged: dict[int, str] = {}

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around changes: some layers may have what others have not when one fails, so all is made anew then."""
        if self._is_torn:
            self._begin()
        self._is_torn = True
        self.num_changes += 1
        yield
        self._is_torn = False

    def refresh(self, num_sink_blocks: int, entries: Sequence[Entry]) -> None:
        """Take in the stream's blocks that are not known yet: from what is kept of them, or else from their keys.

        Args:
            num_sink_blocks: leading blocks to leave out: they are attended always.
            entries: the stream's entries from the first one on; their blocks are durable.
        """
        with self._changing():
            if self._known == 0:
                self._load(num_sink_blocks, entries)
            self._known = max(self._known, num_sink_blocks)
            while self._known < len(entries):
                batch = entries[self._known : self._known + _BATCH]
                self._add(batch)
                self._known += len(batch)

    def is_to_keep(self, entries: Sequence[Entry]) -> bool:
        """Whether the stream has grown by enough since its units were kept, as far as this process knows."""
        grown = _end_of(entries) - self._num_kept_tokens
        return grown >= max(LEAST_TOKENS, self._num_kept_tokens // 8)

    def keep(self, num_sink_blocks: int, entries: Sequence[Entry]) -> None:
        """Keep the units in the store, for the next process; nothing of a stream that has lost blocks.

        Arguments are those of `refresh`.

        Raises:
            KVStoreError: what the store's writer ran into before.
        """
        self.refresh(num_sink_blocks, entries)
        if not self.is_to_keep(entries):  # another process has
            return
        if not self.damaged:
            self._kept.keep(self._layers, num_sink_blocks, entries)
        self._num_kept_tokens = _end_of(entries)

    def _load(self, num_sink_blocks: int, entries: Sequence[Entry]) -> None:
        """Begin with what is kept; with nothing where that is damaged."""
        start, num_blocks = _end_of(entries[:num_sink_blocks]), 0
        for _ in range(2):  # a writer may put another last object between listing and reading
            for memory in self._layers:
                memory.go_on_at(start)
            try:
                num_blocks = self._kept.load(self._layers, num_sink_blocks, entries, _end_of(entries))
                break
            except (CorruptRecordError, UnsupportedFormatError, ShapeError):
                self._begin()
        # What was pending in a layer is read again.
        start = min(start if memory.next_token is None else memory.next_token for memory in self._layers)
        self._known = bisect_right(entries, start, key=_end)
        self._num_kept_tokens = _end_of(entries[:num_blocks])

    def select(
        self, layer: int, query: LayerQuery, budget_tokens: int, end: int, extra: Sequence[ExtraScores] = ()
    ) -> Selection:
        """Choose tokens before number `end` for one layer; see `LayerMemory.select`."""
        return self._layers[layer].select(query, budget_tokens, end, extra)

    def select_together(
        self,
        layers: Sequence[int],
        query: LayerQuery,
        budget_tokens: int,
        end: int,
        extra: Sequence[Sequence[ExtraScores]] = (),
    ) -> list[Selection]:
        """Choose tokens before number `end` for several layers; see `kvstore.retrieval.memory.select_together`."""
        memories = [self._layers[layer] for layer in layers]
        if len({memory.table.num_units for memory in memories}) == 1:
            return select_together(memories, query, budget_tokens, end, extra)
        parts = query.by_layer(len(layers))
        extra = extra or [()] * len(layers)
        return [
            memory.select(part, budget_tokens, end, each)
            for memory, part, each in zip(memories, parts, extra, strict=True)
        ]

    def share_budget(
        self, made: Mapping[int, Selection], selector: SharingSelector, budget_tokens: int, end: int
    ) -> dict[int, Selection]:
        """Choose anew what layers read, of one budget; see `kvstore.retrieval.shared_budget.share_budget`."""
        memories = [self._layers[layer] for layer in made]
        shared = share_budget(memories, list(made.values()), selector, budget_tokens, end)
        return dict(zip(made, shared, strict=True))

    def unit_scores(self, layer: int, scores: Tensor, firsts: Tensor) -> Tensor:
        """Turn scores of blocks, whose first tokens are `firsts`, to those of a layer's units: `[num_units]`."""
        return self._layers[layer].table.best_of_blocks(scores.float().cpu(), firsts).amax(dim=0)

    def _add(self, entries: Sequence[Entry]) -> None:
        slots = torch.empty(len(entries), self._layout.slot_nbytes, dtype=torch.uint8)
        requests = [FetchRequest(entry.key, slot, None) for entry, slot in zip(entries, slots, strict=True)]
        report = self._store.fetch(requests)
        summaries = self._summaries(entries)
        keys, values = self._layout.keys(slots), self._layout.values(slots)
        rows = []
        for number, entry in enumerate(entries):
            if not report.outcomes[number].is_hit:
                self.damaged[entry.index] = report.reasons.get(number, "the block is not stored")
                continue
            try:
                positions = self._positions(entry)
            except CorruptRecordError as error:
                self.damaged[entry.index] = str(error)
                continue
            of_keys, of_values = keys[number, :, :, : entry.num_tokens], values[number, :, :, : entry.num_tokens]
            if not _is_usable(of_keys, LARGEST):
                self.damaged[entry.index] = "its keys are not finite, or too large to be compared"
                continue
            if self._policy.estimated_share and not _is_usable(of_values, LARGEST):  # a sum of them reaches answers
                self.damaged[entry.index] = "its values are not finite, or too large to be summed"
                continue
            received = received_of(summaries.get(entry.index, b""), of_keys.shape[:3])
            rows.append(_Block(entry, of_keys, of_values, positions, received))
        # What a lost block parts is never one unit.
        for _, run in groupby(enumerate(rows), lambda item: item[1].entry.index - item[0]):
            self._add_run([row for _, row in run])

    def _summaries(self, entries: Sequence[Entry]) -> dict[int, bytes]:
        """What is stored beside blocks that follow each other, by their indices."""
        return self._store.summaries(self._header.name, entries[0].index, len(entries))

    def _add_run(self, rows: Sequence[_Block]) -> None:
        entries = [row.entry for row in rows]
        keys = torch.cat([row.keys for row in rows], dim=2)
        values = torch.cat([row.values for row in rows], dim=2)
        received = torch.cat([row.received for row in rows], dim=2)
        positions = torch.cat([row.positions for row in rows], dim=1)
        groups = torch.cat([torch.full((entry.num_tokens,), entry.group) for entry in entries])
        first = entries[0].first_token
        for layer, memory in enumerate(self._layers):
            tokens = LayerTokens(first, keys[layer], values[layer], positions, received[layer], groups, self._rotate)
            known = (memory.next_token or 0) - first
            if known >= tokens.num_tokens:
                continue  # what is kept of this layer goes further than that of another one
            if known < 0:
                memory.close()
            memory.add(tokens.part(max(known, 0), tokens.num_tokens) if known > 0 else tokens)

    @property
    def pending(self) -> Tensor:
        """Numbers of the last tokens, which are in no unit yet: `[num_pending]` int64."""
        end = self._layers[0].next_token
        return torch.arange(0) if end is None else torch.arange(end - self._layers[0].num_pending, end)

    def close_units(self) -> None:
        """Cut what is pending into units for good: what follows is parted from it."""
        with self._changing():
            for memory in self._layers:
                memory.close()

    def show_pending(self) -> None:
        """Let what is in no unit yet be found, without cutting it: where units end must not depend on questions."""
        with self._changing():
            for memory in self._layers:
                memory.show_pending()


def _end(entry: Entry) -> int:
    return entry.first_token + entry.num_tokens


def _end_of(entries: Sequence[Entry]) -> int:
    """Number of the token that follows these blocks."""
    return _end(entries[-1]) if entries else 0


def _is_usable(elements: Tensor, largest: float) -> bool:
    low, high = elements.aminmax()  # no number where an element is none
    return -largest <= float(low) <= float(high) <= largest
