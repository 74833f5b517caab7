# SPDX-License-Identifier: Apache-2.0
"""What a policy can select from in each layer of several streams: no unit reaches from one into the next."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.tokens import Rotate
from kvstore.session.contexts.joining import Joined
from kvstore.session.stream_memory import PositionsOf, StreamMemory
from kvstore.store import Entry, Store, StreamHeader


class ContextsMemory(StreamMemory):
    """`StreamMemory` over the blocks of several streams.

    Args:
        store: see `StreamMemory`, as are the others that are not named here.
        header: likewise.
        policy: likewise.
        rotate: likewise.
        positions: likewise.
        joined: the blocks, and where they come from.
    """

    def __init__(
        self,
        store: Store,
        header: StreamHeader,
        policy: Policy,
        rotate: Rotate | None,
        positions: PositionsOf,
        joined: Joined,
    ) -> None:
        super().__init__(store, header, policy, rotate, positions)
        self._joined = joined

    def refresh(self, num_sink_blocks: int, entries: Sequence[Entry]) -> None:
        """Take in the blocks that are not known yet; see `StreamMemory.refresh`."""
        for end in self._joined.ends:
            super().refresh(num_sink_blocks, entries[:end])
            self.close_units()

    def is_to_keep(self, entries: Sequence[Entry]) -> bool:
        """Never: the blocks are those of other streams."""
        return False

    def _load(self, num_sink_blocks: int, entries: Sequence[Entry]) -> None:
        """Nothing is kept."""

    def _summaries(self, entries: Sequence[Entry]) -> dict[int, bytes]:
        found = {}
        for entry in entries:
            origin = self._joined.origins[entry.index]
            stored = self._store.summaries(origin.stream, origin.entry.index, 1)
            found[entry.index] = stored.get(origin.entry.index, b"")
        return found
