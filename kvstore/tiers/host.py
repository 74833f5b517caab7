# SPDX-License-Identifier: Apache-2.0
"""Host tier: slots in one arena, least recently used goes first, slots in use stay."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.native import Arena
from kvstore.spec import BlockKey


class Lease:
    """The right to use one host slot: while it is held the slot is not evicted. Release it exactly once.

    A slot that waits to be written to disk is simply one on which the writer holds a lease.
    """

    __slots__ = ("_tier", "key", "slot", "slot_idx")

    def __init__(self, tier: HostTier, key: BlockKey, slot_idx: int, slot: Tensor) -> None:
        self._tier = tier
        self.key = key
        self.slot_idx = slot_idx
        self.slot = slot
        """[slot_nbytes] uint8 CPU."""

    def publish(self) -> None:
        """Let others find the block: its bytes are complete."""
        self._tier._publish(self)

    def release(self) -> None:
        """Give the slot up; a published block stays until its slot is needed."""
        self._tier._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class HostTier:
    """A fixed number of slots in page-aligned, pinned where possible, memory. Thread-safe.

    Args:
        layout: layout of a slot.
        nbytes: budget; the tier has `nbytes // slot_nbytes` slots.

    Raises:
        ConfigError: the budget is below two slots: one to fill, one to write out.
    """

    @torch.inference_mode(False)  # its memory is written in every mode
    def __init__(self, layout: BlockLayout, nbytes: int) -> None:
        self._slot_nbytes = layout.slot_nbytes
        self.num_slots = nbytes // layout.slot_nbytes
        if self.num_slots < 2:
            raise ConfigError(
                f"host_nbytes is {nbytes}; a block takes {layout.slot_nbytes}, and two must fit: raise it"
            )
        self._arena = Arena(self.num_slots * layout.slot_nbytes, True)
        self._memory = torch.frombuffer(self._arena, dtype=torch.uint8)
        self._changed = threading.Condition()
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._index: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}  # the published slots
        self._pins = [0] * self.num_slots
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and not leased, oldest first
        self._num_evicted = 0

    @property
    def num_used(self) -> int:
        """Slots that hold a block or are being filled."""
        with self._changed:
            return self.num_slots - len(self._free)

    @property
    def num_evicted(self) -> int:
        """Blocks that made room for others so far."""
        with self._changed:
            return self._num_evicted

    def pin(self, key: BlockKey) -> Lease | None:
        """Lease the slot that holds `key` and mark it as used; None when no slot does."""
        with self._changed:
            slot_idx = self._index.get(key)
            if slot_idx is None:
                return None
            self._pins[slot_idx] += 1
            self._idle.pop(slot_idx, None)
            return self._lease(key, slot_idx)

    def try_reserve(self, key: BlockKey) -> Lease | None:
        """Lease an empty slot for `key`, evicting the least recently used block; None when all slots are leased."""
        with self._changed:
            return self._take(key)

    def reserve(self, key: BlockKey, check: Callable[[], object]) -> Lease:
        """Like `try_reserve`, but wait: this is where producers feel that the disk is slower than they are.

        Args:
            key: the block to come.
            check: called before each wait; raises to give up.
        """
        lease = self.reserve_within(key, check, None)
        assert lease is not None, "waited without a limit"
        return lease

    def reserve_within(self, key: BlockKey, check: Callable[[], object], wait_s: float | None) -> Lease | None:
        """Like `reserve`, but for `wait_s` seconds at most; None when they passed without a slot."""
        until_s = None if wait_s is None else time.monotonic() + wait_s
        with self._changed:
            while True:
                check()
                lease = self._take(key)
                left_s = None if until_s is None else until_s - time.monotonic()
                if lease is not None or (left_s is not None and left_s <= 0):
                    return lease
                self._changed.wait(left_s)

    def contains(self, key: BlockKey) -> bool:
        """True when a slot holds `key`; does not count as a use."""
        with self._changed:
            return key in self._index

    def forget(self, key: BlockKey) -> bool:
        """Stop finding `key`; its slot is free as soon as no lease is left. True when it was there."""
        with self._changed:
            slot_idx = self._index.pop(key, None)
            if slot_idx is None:
                return False
            del self._key_of[slot_idx]
            if slot_idx in self._idle:
                del self._idle[slot_idx]
                self._free.append(slot_idx)
                self._changed.notify_all()
            return True

    def wake(self) -> None:
        """Make everyone who waits in `reserve` run its check again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give the memory back; slots must no longer be used."""
        self._arena.close()

    def _take(self, key: BlockKey) -> Lease | None:
        if self._free:
            slot_idx = self._free.pop()
        elif self._idle:
            slot_idx, _ = self._idle.popitem(last=False)
            del self._index[self._key_of.pop(slot_idx)]
            self._num_evicted += 1
        else:
            return None
        self._pins[slot_idx] = 1
        return self._lease(key, slot_idx)

    def _lease(self, key: BlockKey, slot_idx: int) -> Lease:
        start = slot_idx * self._slot_nbytes
        return Lease(self, key, slot_idx, self._memory[start : start + self._slot_nbytes])

    def _publish(self, lease: Lease) -> None:
        with self._changed:
            # Two threads may have brought the same block; the first one is found, the other slot is freed on release.
            if lease.key not in self._index:
                self._index[lease.key] = lease.slot_idx
                self._key_of[lease.slot_idx] = lease.key

    def _release(self, lease: Lease) -> None:
        with self._changed:
            slot_idx = lease.slot_idx
            assert self._pins[slot_idx] > 0, f"slot {slot_idx} released twice"
            self._pins[slot_idx] -= 1
            if self._pins[slot_idx] == 0:
                if slot_idx in self._key_of:
                    self._idle[slot_idx] = None
                else:
                    self._free.append(slot_idx)
                self._changed.notify_all()
