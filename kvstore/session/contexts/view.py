# SPDX-License-Identifier: Apache-2.0
"""Streams that are asked about together, as one that a model sees: their blocks, and where each is placed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from kvstore.errors import ConfigError, CorruptRecordError, StreamNotFoundError
from kvstore.retrieval.maxsim import LateInteraction
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.tokens import Rotate
from kvstore.session.contexts.joining import Joined, Origin, join
from kvstore.session.contexts.memory import ContextsMemory
from kvstore.session.late.ranking import LateRanking
from kvstore.session.reading.past import PastReader
from kvstore.session.view import SessionConfig, StreamView
from kvstore.spec import BlockKey
from kvstore.store import Entries, Entry, Store, StreamHeader
from kvstore.tiers.manifest import MAX_NAME_NBYTES


class ContextsView(StreamView):
    """What is known of several streams together; nothing is appended to it.

    Blocks are placed by their positions here, so a policy has them where they "were".

    Args:
        store: the open store.
        headers: of the streams, in the order in which they are attended; model, block size and prefill are the same.
        config: see `SessionConfig`; the policy leaves blocks where they are.
        placed: `PARALLEL`, over each other behind what all begin with, where they are stored; or `CONSECUTIVE`, one
            behind the other.
        is_whole: read all of them, and choose nothing.
        rotate: the model's rotary function; None where keys arrive rotated.
        device: where attention runs.
        rows: rows of a position: 1, or 3 for M-RoPE.

    Raises:
        ConfigError: keys are stored rotated, and were to be moved or compared before RoPE.
        StreamNotFoundError: the store has no such stream.
        CorruptRecordError: the entries of one are damaged.
    """

    def __init__(
        self,
        store: Store,
        headers: Sequence[StreamHeader],
        config: SessionConfig,
        placed: PositionPolicy,
        is_whole: bool,
        rotate: Rotate | None,
        device: torch.device,
        rows: int,
    ) -> None:
        if rotate is None and placed is not PositionPolicy.PARALLEL:
            raise ConfigError("keys of these contexts are stored rotated and cannot be moved; place them parallel")
        self._headers = tuple(headers)
        self.is_parallel = placed is PositionPolicy.PARALLEL
        self.is_whole = is_whole
        self._joined = Joined([], [], 0, [])
        self._end_positions: list[int] = []
        together = ", ".join(header.name for header in headers).encode()[:MAX_NAME_NBYTES].decode(errors="ignore")
        super().__init__(store, replace(headers[0], name=together), config, rotate, device, rows)
        self.reader = PastReader(self.residency, rows, has_positions=True)

    @property
    def policy(self) -> Policy:
        """What a question retrieves by: how long all contexts are together says nothing about positions."""
        return self.config.policy

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that all contexts begin with."""
        return sum(entry.num_tokens for entry in self.entries[: self.num_sink_blocks])

    @property
    def ends(self) -> Sequence[int]:
        """For each context, the index behind its last block."""
        return self._joined.ends

    @property
    def end_position(self) -> int:
        """RoPE position behind the longest context, or behind the last one."""
        return max(self._end_positions, default=0)

    def origin_of(self, key: BlockKey) -> Origin | None:
        """The stream that a block was read from, and its entry there."""
        return next((each for each in self._joined.origins if each.entry.key == key), None)

    def reload(self) -> None:
        """Read the manifests again; raises like `StreamView.reload`."""
        manifests = [self.store.manifest(header.name) for header in self._headers]
        for manifest, header in zip(manifests, self._headers, strict=True):
            if manifest.header != header:
                raise StreamNotFoundError(f"stream {header.name!r} was replaced by another; open the contexts again")
            self._check(Entries.of(manifest.entries), 0, manifest.num_tokens)
        joined = join(manifests, self.config.sink_tokens)
        if joined != self._joined:
            self._positions, self._searches = {}, {}
        self._joined, self.entries, self.num_sink_blocks = joined, Entries.of(joined.entries), joined.num_prefix_blocks
        self._shifts = [0] * len(manifests)
        self._end_positions = []
        self._place()

    def _place(self) -> None:
        """Find how far each context is moved, and where it ends then."""
        begin, end = self._span(self.entries[: self.num_sink_blocks])
        last = max(end, begin)
        for number, stop in enumerate(self._joined.ends):
            first = self.num_sink_blocks if number == 0 else max(self._joined.ends[number - 1], self.num_sink_blocks)
            begin, end = self._span(self.entries[first:stop])
            if end > begin and not self.is_parallel:
                self._shifts[number] = last - begin
            self._end_positions.append(max(last if end == begin else end + self._shifts[number], 0))
            last = self._end_positions[-1] if not self.is_parallel else last

    def _span(self, entries: Sequence[Entry]) -> tuple[int, int]:
        """First position of blocks as they are stored, and the one behind the last, as far as they can be read."""
        found = []
        for run in (entries, entries[::-1]):
            for entry in run:
                with suppress(CorruptRecordError):
                    found.append(self._stored_positions(entry))
                    break
        return (int(found[0].min()), int(found[-1].max()) + 1) if found else (0, 0)

    def _stored_positions(self, entry: Entry) -> Tensor:
        origin = self._joined.origins[entry.index]
        if not self.has_positions:
            return torch.arange(origin.entry.first_token, origin.entry.first_token + entry.num_tokens)[None]
        if entry.index not in self._positions:
            stored = self.store.summaries(origin.stream, origin.entry.index, 1)
            self.note_positions(entry, stored.get(origin.entry.index, b""))
        return self._positions[entry.index].long()

    def positions_of(self, entry: Entry) -> Tensor:
        """RoPE positions where a block is placed: `[rows, num_tokens]` int64; see `StreamView.positions_of`."""
        is_moved = entry.index >= self.num_sink_blocks
        return self._stored_positions(entry) + is_moved * self._shifts[self._joined.origins[entry.index].number]

    def first_block_within(self, num_tokens: int) -> int:
        """The block from which on all are read unasked: contexts have no recent end, they are chosen from or whole."""
        return self.num_sink_blocks if self.is_whole else len(self.entries)

    def new_ranking(self, rule: LateInteraction) -> LateRanking:
        """What a policy of late interaction ranks by; no stored index is of several streams together."""
        return LateRanking(self.store, self.header, rule, is_kept=len(self._headers) == 1)

    def new_memory(self, policy: Policy) -> ContextsMemory:
        """What a policy with views selects from."""
        return ContextsMemory(self.store, self.header, policy, self.rotate, self.positions_of, self._joined)
