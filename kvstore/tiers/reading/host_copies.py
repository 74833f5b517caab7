# SPDX-License-Identifier: Apache-2.0
"""Copies between the host tier and slots: serves what is there, takes in what was read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.native import copy_memory
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.eviction.admission import Doorkeeper
from kvstore.tiers.host import HostTier
from kvstore.tiers.lease import Lease
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.reading.request import FetchRequest

_UNIT_NBYTES = 4 << 20
"""Slots are pinned and claimed for as long as it takes to copy so much."""


class HostCopies:
    """Copies blocks out of a host tier and into it. Thread-safe.

    Args:
        host: the tier.
        layout: layout of all slots.
        doorkeeper: says which blocks that were read may enter.
    """

    def __init__(self, host: HostTier, layout: BlockLayout, doorkeeper: Doorkeeper) -> None:
        self._host = host
        self._slot_nbytes = layout.slot_nbytes
        self._layer_nbytes = layout.block_tokens * layout.spec.token_nbytes // layout.spec.num_layers
        self._copied_at_once = max(1, _UNIT_NBYTES // layout.slot_nbytes)
        self._doorkeeper = doorkeeper

    def serve(
        self, requests: Sequence[FetchRequest], ticket: BatchTicket, items: Sequence[int]
    ) -> tuple[list[int], int]:
        """Bring those blocks into their slots that the tier has.

        Returns:
            Items that it has not: the others have ended, copied or too late; and the bytes copied.
        """
        left: list[int] = []
        nbytes = 0
        for first in range(0, len(items), self._copied_at_once):
            some = items[first : first + self._copied_at_once]
            leases: list[Lease | None] = []
            try:
                self._host.pin_some([requests[item].key for item in some], leases)
                pinned = {item: lease for item, lease in zip(some, leases, strict=True) if lease is not None}
                left += [item for item in some if item not in pinned] if pinned else some
                if not pinned:
                    continue
                with ticket.claiming_some(list(pinned)) as claims:
                    asked = [(pinned[item].address, requests[item]) for item in claims.held]
                    nbytes += self._copy([(at, each.slot, each.layers) for at, each in asked])
                    claims.outcomes = dict.fromkeys(claims.held, Outcome.HOST)
            finally:
                self._host.release_some([lease for lease in leases if lease is not None])
        return left, nbytes

    def copy(self, source: Tensor, target: Tensor, layers: range | None) -> None:
        """Copy a block, or some layers of it, from slot to slot."""
        self._copy([(source.data_ptr(), target, layers)])

    def entering(self, blocks: Sequence[tuple[BlockKey, str]]) -> list[bool]:
        """Say which blocks of a batch, keys with their owners, are to be admitted when they come."""
        if not self._doorkeeper.is_open:
            return [True] * len(blocks)  # how many it lets in, nobody knows before
        return self._host.may_stay(blocks)

    def admit(self, blocks: Sequence[tuple[BlockKey, str, Tensor]], asked_at: int) -> None:
        """Keep copies of blocks, each if it may enter and a slot can be had without waiting; see `Lease.publish`.

        Args:
            blocks: key, owner and slot of each.
            asked_at: see `Lease.publish`.
        """
        present = self._host.present([key for key, _, _ in blocks])
        entering = {
            key: (owner, slot)
            for (key, owner, slot), is_there in zip(blocks, present, strict=True)
            if not is_there and self._doorkeeper.admits(key)
        }
        leases: list[Lease] = []
        try:
            self._host.reserve_some([(key, owner) for key, (owner, _) in entering.items()], leases)
            copy_memory([(entering[each.key][1].data_ptr(), each.address, self._slot_nbytes) for each in leases])
            self._host.publish_some(leases, asked_at=asked_at)
        finally:
            self._host.release_some(leases)

    def _copy(self, copies: Sequence[tuple[int, Tensor, range | None]]) -> int:
        """Copy between slots, from addresses; returns the bytes."""
        spans = []
        for source, target, layers in copies:
            start, nbytes = 0, self._slot_nbytes
            if layers is not None:
                start, nbytes = layers.start * self._layer_nbytes, len(layers) * self._layer_nbytes
            spans.append((source + start, target.data_ptr() + start, nbytes))
        copy_memory(spans)
        return sum(nbytes for _, _, nbytes in spans)
