# SPDX-License-Identifier: Apache-2.0
"""What waits in the writer's queue: parts of appends, objects of streams, and puts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.host import Lease
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.tables.object_body import PackedObject
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
        is_first: begins an append; parts of one before it that got no last part are dropped.
    """

    stream_id: int
    entries: Sequence[Entry]
    summaries: Sequence[bytes]
    leases: Sequence[Lease]
    cursor_json: bytes | None
    is_first: bool

    @property
    def num_blocks(self) -> int:
        """Blocks in this part."""
        return len(self.entries)


@dataclass(frozen=True, slots=True)
class ObjectJob:
    """One `put_objects`, which takes place as a whole.

    Args:
        stream_id: where they go.
        objects: what the stream gains.
        may_drop: whether they are left out where there is no room.
    """

    stream_id: int
    objects: Sequence[PackedObject]
    may_drop: bool

    @property
    def num_blocks(self) -> int:
        """Objects are no blocks."""
        return 0

    @property
    def leases(self) -> Sequence[Lease]:
        """Objects take no host slots."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes that wait in memory."""
        return sum(each.body_nbytes for each in self.objects)


@dataclass(frozen=True, slots=True)
class PutJob:
    """One `put`, or a part of one.

    Args:
        ticket: tells the caller what became of each block.
        items: which items of the ticket these are.
        keys: one per block.
        slots: the blocks: the caller's, claimed while they are written, or those of `leases`.
        num_tokens: tokens in each.
        leases: host slots that hold copies of the blocks, so that the caller need not wait; empty when it does.
    """

    ticket: BatchTicket
    items: Sequence[int]
    keys: Sequence[BlockKey]
    slots: Sequence[Tensor]
    num_tokens: Sequence[int]
    leases: Sequence[Lease] = ()

    @property
    def num_blocks(self) -> int:
        """Blocks to write."""
        return len(self.keys)

    def begin(self) -> list[int]:
        """Return the numbers of the blocks that are still to be written; their slots stay as they are until `end`."""
        if self.leases:
            return [number for number, item in enumerate(self.items) if self.ticket.is_open(item)]
        return self.ticket.claim_open(self.items)

    def end(self, numbers: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """Tell the outcomes of the blocks that `begin` returned."""
        end_all = self.ticket.settle_all if self.leases else self.ticket.unclaim_all
        end_all([self.items[number] for number in numbers], outcomes)
        self.drop()

    def drop(self) -> None:
        """End the job without writing, or after it: what has no outcome was not stored."""
        self.ticket.settle_all(self.items, [Outcome.UNAVAILABLE] * len(self.items))
        for lease in self.leases:
            lease.release()


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
