# SPDX-License-Identifier: Apache-2.0
"""A block store that is memory alone: for tests, and in front of a store that is far away."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from kvstore.errors import BusyError
from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.host import HostTier
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.slots import check_blocks, check_gets, check_keys, copy_slot


class HostStore:
    """Keeps blocks in a host tier until others need their slots; what `block_store.BlockStore` promises. Thread-safe.

    Args:
        layout: layout of the slots.
        nbytes: memory; at least two slots.

    Raises:
        ConfigError: `nbytes` is too little.
    """

    def __init__(self, layout: BlockLayout, nbytes: int) -> None:
        self._layout = layout
        self._host = HostTier(layout, nbytes)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-host-store")
        self._is_open = True

    @property
    def layout(self) -> BlockLayout:
        """Layout of every slot."""
        return self._layout

    def put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> list[Outcome]:
        """Store blocks; `FULL` where every slot is in use at the moment."""
        return self.submit_put(keys, slots, num_tokens, timeout_s=timeout_s).outcomes()

    def get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> list[Outcome]:
        """Bring blocks into slots."""
        return self.submit_get(keys, slots, timeout_s=timeout_s).outcomes()

    def submit_put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> BatchTicket:
        """Like `put`, and return at once."""
        self._check_open()
        check_blocks(keys, slots, num_tokens, self._layout)
        ticket = BatchTicket(len(keys), timeout_s)
        self._thread.submit(self._put, list(keys), list(slots), ticket)
        return ticket

    def submit_get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> BatchTicket:
        """Like `get`, and return at once."""
        self._check_open()
        check_gets(keys, slots, self._layout)
        ticket = BatchTicket(len(keys), timeout_s)
        self._thread.submit(self._get, list(keys), list(slots), ticket)
        return ticket

    def exists(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Say per block whether it is there."""
        self._check_open()
        check_keys(keys)
        return [self._host.contains(key) for key in keys]

    def remove(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Forget blocks; says per block whether it was there."""
        self._check_open()
        check_keys(keys)
        return [self._host.forget(key) for key in keys]

    def close(self) -> None:
        """Finish what was submitted, then give the memory back; a second call does nothing."""
        self._is_open = False
        self._thread.shutdown()
        self._host.close()

    def _check_open(self) -> None:
        if not self._is_open:
            raise BusyError("the store is closed")

    def _put(self, keys: Sequence[BlockKey], slots: Sequence[Tensor], ticket: BatchTicket) -> None:
        try:
            for item, (key, slot) in enumerate(zip(keys, slots, strict=True)):
                with ticket.claiming(item) as claim:
                    if claim.is_held:
                        claim.outcome = self._put_one(key, slot)
        finally:
            ticket.settle_rest(Outcome.UNAVAILABLE)

    def _put_one(self, key: BlockKey, slot: Tensor) -> Outcome:
        lease = self._host.pin(key)
        if lease is None:
            lease = self._host.try_reserve(key)
            if lease is None:
                return Outcome.FULL
            with lease:
                copy_slot(slot, lease.slot)
                lease.publish()
        else:
            lease.release()
        return Outcome.STORED

    def _get(self, keys: Sequence[BlockKey], slots: Sequence[Tensor], ticket: BatchTicket) -> None:
        try:
            for item, (key, slot) in enumerate(zip(keys, slots, strict=True)):
                with ticket.claiming(item) as claim:
                    if claim.is_held:
                        claim.outcome = self._get_one(key, slot)
        finally:
            ticket.settle_rest(Outcome.UNAVAILABLE)

    def _get_one(self, key: BlockKey, slot: Tensor) -> Outcome:
        lease = self._host.pin(key)
        if lease is None:
            return Outcome.MISS
        with lease:
            copy_slot(lease.slot, slot)
        return Outcome.HOST
