# SPDX-License-Identifier: Apache-2.0
"""What waits in the writer's queue: parts of appends, and puts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from kvstore.spec import BlockKey
from kvstore.tiers.host import Lease
from kvstore.tiers.tables.records import Entry


@dataclass(frozen=True, slots=True)
class AppendPiece:
    """Part of one `append`; the last part carries the cursor and makes the whole append visible.

    Args:
        stream_id: where it goes.
        entries: what the manifest gains.
        summaries: one per entry.
        leases: one host slot per entry, holding its block; the writer releases them.
        cursor_json: the producer's position, in the last part; None in the others.
    """

    stream_id: int
    entries: Sequence[Entry]
    summaries: Sequence[bytes]
    leases: Sequence[Lease]
    cursor_json: bytes | None

    @property
    def num_blocks(self) -> int:
        """Blocks in this part."""
        return len(self.entries)


@dataclass(frozen=True, slots=True)
class PutJob:
    """One `put`: the caller waits for `result`, so its tensors are read in place."""

    keys: Sequence[BlockKey]
    slots: Sequence[Tensor]
    num_tokens: Sequence[int]
    result: Future[list[bool]] = field(default_factory=Future)

    @property
    def num_blocks(self) -> int:
        """Blocks to write."""
        return len(self.keys)


@dataclass(slots=True)
class GrowingAppend:
    """Parts of an append that wait for the last one, which brings the cursor."""

    stream_id: int
    entries: list[Entry] = field(default_factory=list)
    summaries: list[bytes] = field(default_factory=list)
    cursor_json: bytes = b""

    def add(self, piece: AppendPiece) -> None:
        """Join the next part."""
        self.entries.extend(piece.entries)
        self.summaries.extend(piece.summaries)
        self.cursor_json = piece.cursor_json or b""
