# SPDX-License-Identifier: Apache-2.0
"""Copies between the host tier and slots: serves what is there, takes in what was read."""

from __future__ import annotations

from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.eviction.admission import Doorkeeper
from kvstore.tiers.host import HostTier
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.reading.request import FetchRequest
from kvstore.tiers.slots import copy_slot


class HostCopies:
    """Copies blocks out of a host tier and into it. Thread-safe.

    Args:
        host: the tier.
        layout: layout of all slots.
        doorkeeper: says which blocks that were read may enter.
    """

    def __init__(self, host: HostTier, layout: BlockLayout, doorkeeper: Doorkeeper) -> None:
        self._host = host
        self._layout = layout
        self._doorkeeper = doorkeeper

    def serve(self, request: FetchRequest, ticket: BatchTicket, item: int) -> tuple[bool, int]:
        """Bring a block into its slot if the tier has it.

        Returns:
            Whether the item has ended, copied or too late; and the bytes copied.
        """
        lease = self._host.pin(request.key)
        if lease is None:
            return False, 0
        nbytes = 0
        with lease, ticket.claiming(item) as claim:
            if claim.is_held:
                nbytes = self.copy(lease.slot, request.slot, request.layers)
                claim.outcome = Outcome.HOST
        return True, nbytes

    def copy(self, source: Tensor, target: Tensor, layers: range | None) -> int:
        """Copy a block, or some layers of it, from slot to slot; returns the bytes."""
        start, nbytes = 0, self._layout.slot_nbytes
        if layers is not None:
            per_layer = self._layout.block_tokens * self._layout.spec.token_nbytes // self._layout.spec.num_layers
            start, nbytes = layers.start * per_layer, len(layers) * per_layer
        copy_slot(source[start : start + nbytes], target[start : start + nbytes])
        return nbytes

    def admit(self, key: BlockKey, slot: Tensor, owner: str, asked_at: int) -> None:
        """Keep a copy of a block if it may enter and a slot can be had without waiting; see `Lease.publish`."""
        if self._host.contains(key) or not self._doorkeeper.admits(key):
            return
        lease = self._host.try_reserve(key, owner)
        if lease is None:
            return
        with lease:
            copy_slot(slot, lease.slot)
            lease.publish(asked_at=asked_at)
