# SPDX-License-Identifier: Apache-2.0
"""Late interaction over one stream: reads the compared layers of its blocks, indexes them, and ranks blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.retrieval.index.faiss_index import make_index
from kvstore.retrieval.maxsim import LateInteraction, MaxSimScorer
from kvstore.retrieval.selection import Ranking
from kvstore.store import Entry, FetchRequest, Store, StreamHeader

_BATCH = 16
_SAMPLE = 64


class LateRanking:
    """Ranks the blocks of one stream; the index is built on first use and extended later.

    A block that cannot be read is not found, which is no error: `damaged` says why, by the block's index.

    Args:
        store: the open store.
        header: the stream's header.
        rule: which layers are compared, and how.
    """

    def __init__(self, store: Store, header: StreamHeader, rule: LateInteraction) -> None:
        self._store = store
        self._header = header
        self._rule = rule
        self._layout = BlockLayout(header.spec, header.block_tokens)
        self.layers = rule.layers(header.spec.num_layers)
        self._known = 0
        self._num_averaged = 0
        self._maxsim: MaxSimScorer | None = None
        self.damaged: dict[int, str] = {}

    def refresh(self, num_sink_blocks: int, entries: Sequence[Entry]) -> None:
        """Index the stream's blocks that are not indexed yet.

        Args:
            num_sink_blocks: leading blocks to leave out: they are attended always.
            entries: the stream's entries from the first one on; their blocks are durable.
        """
        if len(entries) <= max(self._known, num_sink_blocks):
            return
        # Directions are taken from the mean key of half the stream or more; which blocks count depends on the stream's
        # length alone, so that scores do not depend on when a process began to look.
        num_averaged = 1 << len(entries).bit_length() - 1
        if num_averaged != self._num_averaged:
            self._begin(entries[num_sink_blocks:], max(num_averaged - num_sink_blocks, 1))
            self._num_averaged, self._known = num_averaged, 0
        self._known = max(self._known, num_sink_blocks)
        for batch in _batches(entries[self._known :]):
            assert self._maxsim is not None, "begun above"
            self._maxsim.add(self._token_keys(batch))
            self._known += len(batch)

    def rank(self, question: Tensor, num_blocks: int) -> Ranking:
        """Rank the blocks for all layers at once.

        Args:
            question: [num_tokens, num_parts, kv_heads * key_dim] float32 pre-RoPE keys of the question in the layers
                that `layers` names.
            num_blocks: blocks of the stream.
        """
        if self._maxsim is None:
            return Ranking(torch.empty(0, dtype=torch.int64), torch.empty(0))
        return self._maxsim.rank(question, self._known).before(num_blocks)

    def _begin(self, entries: Sequence[Entry], num_averaged: int) -> None:
        """Start an index over token keys, centred by the mean of a sample of the first `num_averaged` blocks."""
        row_dim = self._header.spec.kv_heads * self._header.spec.key_dim
        stride = max(num_averaged // _SAMPLE, 1)
        sampled = entries[:num_averaged:stride]
        sample = [keys for batch in _batches(sampled) for _, keys in self._token_keys(batch)]
        mean = torch.cat(sample).mean(dim=0) if sample else torch.zeros(len(self.layers), row_dim)
        num_rows = sum(entry.num_tokens for entry in entries)
        self._maxsim = None  # its memory goes before that of the next is taken
        self._maxsim = MaxSimScorer(make_index(len(self.layers) * row_dim, num_rows), mean, self._rule.hits_per_token)
        self.damaged = {}  # every block is read again

    def _token_keys(self, entries: Sequence[Entry]) -> list[tuple[int, Tensor]]:
        """Read the compared layers of blocks: (block, `[num_tokens, num_parts, kv_heads * key_dim]` float32)."""
        # Slots of whole blocks, of which only the pages of the compared layers are ever touched.
        slots = torch.empty(len(entries), self._layout.slot_nbytes, dtype=torch.uint8)
        report = self._store.fetch(
            [
                FetchRequest(entry.key, slot, range(layer, layer + 1))
                for entry, slot in zip(entries, slots, strict=True)
                for layer in self.layers
            ]
        )
        planes = self._layout.keys(slots)[:, list(self.layers)]
        found = []
        for number, entry in enumerate(entries):
            first = number * len(self.layers)
            lost = [at for at in range(first, first + len(self.layers)) if not report.outcomes[at].is_hit]
            keys = planes[number, :, :, : entry.num_tokens].permute(2, 0, 1, 3).flatten(2).float()
            if lost:
                self.damaged[entry.index] = report.reasons.get(lost[0], "the block is not stored")
            elif not keys.isfinite().all():
                self.damaged[entry.index] = "its keys are not finite"
            else:
                found.append((entry.index, keys))
        return found


def _batches(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    for first in range(0, len(entries), _BATCH):
        yield entries[first : first + _BATCH]
