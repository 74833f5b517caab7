# SPDX-License-Identifier: Apache-2.0
"""What a forward that appends attends to: sinks, the window, and what its layers retrieve if the policy says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.tokens import LayerQuery
from kvstore.session.attending import Attending, PlacedPast
from kvstore.session.reading.past import PastTokens, Reading
from kvstore.session.residency import LoadReport
from kvstore.session.view import StreamView
from kvstore.store import Entry


class AppendWindow(Attending):
    """Contexts of the forwards that append to one stream.

    The window is made of whole blocks, so it depends on the stream alone: a resumed session attends exactly as one
    that was never interrupted. Its blocks, and the sinks, stay pinned.

    Args:
        view: the stream.
    """

    def __init__(self, view: StreamView) -> None:
        config = view.config
        self.retrieves = config.policy.retrieves_while_appending
        # What was dropped inside of the window leaves no gap, or windows could outgrow the trained length.
        closed_up = PositionPolicy.SHRINK if view.is_thinned else PositionPolicy.CONSECUTIVE
        position = config.policy.position if self.retrieves else closed_up
        super().__init__(view.residency, view.rotate, position, config.window_tokens, view.rows)
        self._view = view
        self._first = 0
        self._firsts = torch.empty(0, dtype=torch.int64)
        self._past: PastTokens | None = None
        self._placed_past: PlacedPast | None = None
        # Its own: that of questions knows blocks of the window.
        self._memory = view.new_memory(config.policy) if self.retrieves else None
        self.is_stale = True
        """Whether the contexts are not those of the coming forward."""

    @property
    def blocks(self) -> Sequence[Entry]:
        """The window, in order."""
        return self._view.entries[self._first :]

    def open(self) -> LoadReport:
        """Load sinks and window, and pin them; reports those that cannot be had."""
        view = self._view
        self._first = view.first_block_within(view.config.window_tokens)
        kept = [*self._sinks(), *self.blocks]
        return view.residency.load([entry.key for entry in kept], range(view.num_layers))

    def slide(self) -> None:
        """Let go of blocks that the coming forward does not see any more; take back those that it sees again.

        Raises:
            CorruptRecordError: tokens were dropped, and a block that is seen instead cannot be read.
        """
        view = self._view
        first = view.first_block_within(view.config.window_tokens)
        if first == self._first:
            return
        low, high = (max(each, view.num_sink_blocks) for each in sorted((first, self._first)))
        keys = [entry.key for entry in view.entries[low:high]]
        if first > self._first:
            view.residency.unpin(keys)
        else:
            report = view.residency.load(keys, range(view.num_layers))
            for reason in report.lost.values():
                view.residency.unpin([key for key in keys if key not in report.lost])
                raise CorruptRecordError(f"stream {view.header.name!r}: {reason}; its window cannot be had")
        self._first = first
        self.is_stale = True

    def assemble(self, layer: int, query: Tensor, positions: Tensor) -> None:
        """Make one layer's past, unless it is that of the last forward.

        Args:
            layer: layer index; layer 0 comes first.
            query: [1, num_heads, num_asking, key_dim]: the forward's first queries, which retrieve.
            positions: [rows, 1, num_new] int64.

        Raises:
            CorruptRecordError: a block of the window, or one that was retrieved, cannot be read: what comes next would
                be computed from a past with a hole.
        """
        if not self.is_stale and not self.retrieves:
            return
        view, start = self._view, int(positions.min())
        if layer == 0:
            self._firsts = view.entries.first_tokens
        if layer == 0 or self.retrieves:  # else the same rows in every layer, found once
            chosen = self._retrieve(layer, query, positions[:, 0, : query.shape[2]]) if self.retrieves else ()
            report = LoadReport()
            layers = range(layer, layer + 1) if self.retrieves else range(view.num_layers)
            reading = Reading.of(self._sinks(), chosen, self.blocks)
            self._past = view.reader.read(reading, view.entries, self._firsts, view.positions_of, layers, report)
            for reason in report.lost.values():
                raise CorruptRecordError(
                    f"stream {view.header.name!r}: {reason}; open the stream again: what was retrieved is not found "
                    "then"
                )
            self._placed_past = self.place_past(
                self._past,
                [rows.positions for rows in view.open_rows],
                num_stored=view.entries.end_token,
                end=start,
                tail_start=start,
            )
        assert self._placed_past is not None, "layer 0 came first"
        assert self._past is not None, "likewise"
        context = self.contexts[layer]
        context.drop_tail(context.num_tail)
        self.set_past(layer, self._past, view.open_planes(layer), self._placed_past)
        if layer == view.num_layers - 1:
            self._past = None  # the contexts hold copies

    def _sinks(self) -> Sequence[Entry]:
        return self._view.entries[: min(self._view.num_sink_blocks, self._first)]

    def _retrieve(self, layer: int, query: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Tokens between sinks and window that a layer's queries ask for."""
        view, memory = self._view, self._memory
        assert memory is not None, "asked by the caller"
        if layer == 0:
            memory.refresh(view.num_sink_blocks, view.entries[: self._first])
        request = LayerQuery(
            query[0].unflatten(0, (view.header.spec.kv_heads, -1)), positions, view.rotate, view.config.window_tokens
        )
        end = self.blocks[0].first_token if self.blocks else view.num_tokens
        chosen = memory.select(layer, request, view.config.budget_tokens, end).tokens
        pending = memory.pending[memory.pending < end]  # where tokens were dropped, some are in the window again
        return tuple(torch.cat([tokens, pending]) for tokens in chosen)
