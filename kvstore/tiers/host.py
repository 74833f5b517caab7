# SPDX-License-Identifier: Apache-2.0
"""Host tier: slots in one arena; a policy says whose block makes room, slots in use stay."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from kvstore.config import HostConfig
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.native import Arena
from kvstore.spec import BlockKey
from kvstore.tiers.eviction.partitions import NOBODY, Partitions
from kvstore.tiers.forgotten import Forgotten
from kvstore.tiers.lease import Lease

__all__ = ["HostTier", "Lease"]

_KEPT_SHARE = 0.5
"""Blocks that are kept may take this much of the tier, so that others always find room."""


class HostTier:
    """A fixed number of slots in page-aligned, pinned where possible, memory. Thread-safe.

    Args:
        layout: layout of a slot.
        nbytes: budget; the tier has `nbytes // slot_nbytes` slots.
        config: who leaves when it is full, and how much one stream may take.

    Raises:
        ConfigError: the budget, or a stream's share of it, is below two slots: one to fill, one to write out.
    """

    @torch.inference_mode(False)  # its memory is written in every mode
    def __init__(self, layout: BlockLayout, nbytes: int, config: HostConfig | None = None) -> None:
        config = config or HostConfig()
        self._slot_nbytes = layout.slot_nbytes
        self.num_slots = nbytes // layout.slot_nbytes
        quota = None if config.stream_nbytes is None else config.stream_nbytes // layout.slot_nbytes
        for name, found, slots in (
            ("host_nbytes", nbytes, self.num_slots),
            ("stream_nbytes", config.stream_nbytes, 2 if quota is None else quota),
        ):
            if slots < 2:
                raise ConfigError(f"{name} is {found}; a block takes {layout.slot_nbytes}, and two must fit: raise it")
        self._memory = torch.frombuffer(Arena(self.num_slots * layout.slot_nbytes, True), dtype=torch.uint8)
        self._is_closed = False
        self._lock = threading.Lock()  # in `with`, as in `BatchTicket`
        self._changed = threading.Condition(self._lock)
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._owner_of = [NOBODY] * self.num_slots
        self._index: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}  # the published slots
        self._pins = [0] * self.num_slots
        self._num_idle = 0  # published and not leased
        self._order = Partitions(config.eviction, self.num_slots, quota)
        self._kept: set[BlockKey] = set()
        self._num_kept: Counter[str] = Counter()  # published slots with such blocks, by owner
        self._speculative: set[int] = set()  # brought by a prefetch, and not asked for since
        self._forgotten = Forgotten()
        self.num_evicted = 0
        self.num_prefetch_hits = 0
        self.num_prefetch_wasted = 0

    @property
    def num_used(self) -> int:
        """Slots that hold a block or are being filled."""
        with self._lock:
            return self.num_slots - len(self._free)

    @property
    def num_forgotten(self) -> int:
        """Times that a block was to be forgotten."""
        return self._forgotten.num_noted

    def pin(self, key: BlockKey, *, is_use: bool = True) -> Lease | None:
        """Lease the slot that holds `key`, and mark it as used unless told not to; None when no slot does."""
        with self._lock:
            return self._pin(key, is_use)

    def pin_some(self, keys: Iterable[BlockKey], leases: list[Lease | None]) -> None:
        """`pin` of many; `leases` gains what was had, for the caller to release, however this ends."""
        with self._lock:
            leases.extend(self._pin(key, is_use=True) for key in keys)

    def try_reserve(self, key: BlockKey, owner: str = NOBODY) -> Lease | None:
        """Lease an empty slot for `key`, evicting whose turn it is; None when all slots that may be had are leased."""
        with self._lock:
            return self._take(key, owner)

    def reserve_some(self, wanted: Sequence[tuple[BlockKey, str]], leases: list[Lease]) -> None:
        """Like `pin_some`, `try_reserve` those, keys with owners, that are not here: the last ones if not all fit."""
        with self._lock:
            missed = [each for each in reversed(wanted) if each[0] not in self._index]
            missed.sort(key=lambda each: each[0] not in self._kept)  # stable; those that are kept come first
            leases.extend(lease for key, owner in missed if (lease := self._take(key, owner)) is not None)
            leases.reverse()

    def may_stay(self, wanted: Sequence[tuple[BlockKey, str]]) -> list[bool]:
        """Say which of many, that are about to come in any order, need not make room for one another again."""
        if not self._order.is_by_age or len(wanted) <= self.num_slots:
            return [True] * len(wanted)
        seen: Counter[str] = Counter()
        staying: list[bool] = []
        with self._lock:
            for key, owner in reversed(wanted):
                seen[owner] += 1
                staying.append(seen[owner] <= self.num_slots or key in self._kept)
        return staying[::-1]

    def reserve(self, key: BlockKey, check: Callable[[], object], owner: str = NOBODY) -> Lease:
        """Like `try_reserve`, but wait: this is where producers feel that the disk is slower than they are.

        Args:
            key: the block to come.
            check: called before each wait; raises to give up.
            owner: the stream that it belongs to.
        """
        with self._lock:
            while True:
                check()
                if (lease := self._take(key, owner)) is not None:
                    return lease
                self._changed.wait()

    def reserve_within(self, key: BlockKey, left_s: Callable[[], float | None], owner: str = NOBODY) -> Lease | None:
        """Like `reserve`, for as long as `left_s` says, each time before it waits; None when nothing is left."""
        with self._lock:
            while True:
                lease = self._take(key, owner)
                span_s = left_s()
                if lease is not None or (span_s is not None and span_s <= 0):
                    return lease
                self._changed.wait(span_s)

    def publish_some(
        self, leases: Iterable[Lease], *, is_prefetched: bool = False, asked_at: int | None = None
    ) -> None:
        """`Lease.publish` of many."""
        with self._lock:
            for lease in leases:
                self._publish(lease, is_prefetched, asked_at)

    def release_some(self, leases: Iterable[Lease]) -> None:
        """`Lease.release` of many."""
        with self._lock:
            for lease in leases:
                self._release(lease)

    def contains(self, key: BlockKey) -> bool:
        """True when a slot holds `key`; does not count as a use."""
        with self._lock:
            return key in self._index

    def present(self, keys: Sequence[BlockKey]) -> list[bool]:
        """`contains` of many."""
        with self._lock:
            return [key in self._index for key in keys]

    def keep(self, keys: Iterable[BlockKey]) -> None:
        """Never evict these blocks, as far as they fit half the tier: sinks, which every question attends to.

        They may fill half of a stream's share of the tier; more of them come on top of it.
        """
        with self._lock:
            for key in keys:
                if len(self._kept) < int(_KEPT_SHARE * self.num_slots) and key not in self._kept:
                    self._kept.add(key)
                    self._count_kept(key, 1)

    def unkeep(self, keys: Iterable[BlockKey]) -> None:
        """Undo `keep`."""
        with self._lock:
            for key in self._kept.intersection(keys):
                self._count_kept(key, -1)
                self._kept.remove(key)
            self._changed.notify_all()

    def attend(self, masses: Mapping[BlockKey, float]) -> None:
        """Note how much attention blocks got, for policies that mind; see `EvictionPolicy.attend`."""
        with self._lock:
            for key, mass in masses.items():
                if key in self._index:
                    self._order.attend(key, mass)

    def forget(self, key: BlockKey) -> bool:
        """Stop finding `key`; its slot is free as soon as no lease is left. True when it was there."""
        return self._forget(key, is_forced=True)

    def forget_idle(self, key: BlockKey) -> bool:
        """Like `forget`, but a block that is in use stays: one that waits to be written is not lost this way."""
        return self._forget(key, is_forced=False)

    def _forget(self, key: BlockKey, *, is_forced: bool) -> bool:
        with self._lock:
            self._forgotten.note(key)
            slot_idx = self._index.get(key)
            if slot_idx is None or (self._pins[slot_idx] > 0 and not is_forced):
                return False
            self._order.remove(key)
            self._unpublish(slot_idx)
            if self._pins[slot_idx] == 0:
                self._num_idle -= 1
                self._give_back(slot_idx)
            return True

    def wake(self) -> None:
        """Make everyone who waits in `reserve` run its check again."""
        with self._lock:
            self._changed.notify_all()

    def close(self) -> None:
        """Find and lease nothing any more; the memory goes with the last slot that is still in use."""
        with self._changed:
            self._is_closed, self._memory = True, torch.empty(0, dtype=torch.uint8)

    def _take(self, key: BlockKey, owner: str) -> Lease | None:
        if self._is_closed:
            return None
        is_at_quota = self._order.is_at_quota(owner, self._num_kept[owner])
        if not self._free or is_at_quota:
            victim = self._order.victim(owner if is_at_quota else None, self._may_leave) if self._num_idle else None
            if victim is None:
                return None
            slot_idx = self._index[victim]
            self._unpublish(slot_idx)
            self._num_idle -= 1
            self.num_evicted += 1
            self._give_back(slot_idx)
        slot_idx = self._free[-1]
        self._owner_of[slot_idx] = owner
        lease = self._lease(key, slot_idx)
        self._order.take(owner)
        del self._free[-1]  # last, and no call from here on: an interrupt comes before all of it or after
        self._pins[slot_idx] = 1
        return lease

    def _may_leave(self, key: BlockKey) -> bool:
        return self._pins[self._index[key]] == 0 and key not in self._kept

    def _count_kept(self, key: BlockKey, change: int) -> None:
        slot_idx = self._index.get(key)
        if slot_idx is not None and key in self._kept:
            self._num_kept[self._owner_of[slot_idx]] += change

    def _unpublish(self, slot_idx: int) -> None:
        key = self._key_of[slot_idx]
        self._count_kept(key, -1)
        if slot_idx in self._speculative:
            self._speculative.remove(slot_idx)
            self.num_prefetch_wasted += 1
        del self._key_of[slot_idx], self._index[key]  # last, as in `_take`: what is found is never a free slot

    def _give_back(self, slot_idx: int) -> None:
        self._free.append(slot_idx)
        self._order.give_back(self._owner_of[slot_idx])
        self._changed.notify_all()

    def _pin(self, key: BlockKey, is_use: bool) -> Lease | None:
        slot_idx = self._index.get(key)
        if slot_idx is None or self._is_closed:
            return None
        lease = self._lease(key, slot_idx)
        if is_use:
            self._order.use(key)
            if slot_idx in self._speculative:
                self._speculative.remove(slot_idx)
                self.num_prefetch_hits += 1
        self._num_idle -= self._pins[slot_idx] == 0  # last, as in `_take`
        self._pins[slot_idx] += 1
        return lease

    def _lease(self, key: BlockKey, slot_idx: int) -> Lease:
        return Lease(self, key, slot_idx, self._memory, self._slot_nbytes, self._owner_of[slot_idx])

    def _publish(self, lease: Lease, is_prefetched: bool, asked_at: int | None) -> None:
        # Two threads may have brought the same block; the first one is found, the other slot is freed on release.
        is_gone = asked_at is not None and self._forgotten.may_have_since(lease.key, asked_at)
        if lease.key not in self._index and not is_gone:
            self._order.add(lease.key, lease.owner)
            self._index[lease.key] = lease.slot_idx
            self._key_of[lease.slot_idx] = lease.key
            self._count_kept(lease.key, 1)
            if is_prefetched:
                self._speculative.add(lease.slot_idx)

    def _release(self, lease: Lease) -> None:
        slot_idx = lease.slot_idx
        assert self._pins[slot_idx] > 0, f"slot {slot_idx} released twice"
        self._pins[slot_idx] -= 1
        if self._pins[slot_idx] == 0 and slot_idx in self._key_of:
            self._num_idle += 1
            self._changed.notify_all()
        elif self._pins[slot_idx] == 0:
            self._give_back(slot_idx)
