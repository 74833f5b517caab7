# SPDX-License-Identifier: Apache-2.0
"""Device tier: a pool of slots where attention reads them; plain torch memory on a GPU or the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.errors import CapacityError, ConfigError
from kvstore.layout import BlockLayout


class DevicePool:
    """A fixed number of slots in one allocation, not cleared. Not thread-safe: the engine's thread owns it.

    Args:
        layout: layout of a slot.
        num_slots: how many blocks fit.
        device: where the memory lies.

    Raises:
        ConfigError: `num_slots` is below one.
        CapacityError: the device has not that much memory.
    """

    def __init__(self, layout: BlockLayout, num_slots: int, device: torch.device) -> None:
        if num_slots < 1:
            raise ConfigError(f"device pool of {num_slots} slots; at least one is needed")
        self.layout = layout
        self.device = device
        try:
            self._memory = torch.empty(num_slots, layout.slot_nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch has a type of its own for a full GPU, and none for full host memory
            nbytes = num_slots * layout.slot_nbytes
            raise CapacityError(
                f"{device}: no room for {num_slots} slots, {nbytes} bytes; lower device_nbytes: {error}"
            ) from error
        self._keys, self._values = layout.keys(self._memory), layout.values(self._memory)
        self._free = list(range(num_slots - 1, -1, -1))
        self._is_used = [False] * num_slots

    @property
    def num_slots(self) -> int:
        """How many blocks fit."""
        return len(self._is_used)

    @property
    def num_free(self) -> int:
        """Slots that nobody has taken."""
        return len(self._free)

    @property
    def memory(self) -> Tensor:
        """All slots: [num_slots, slot_nbytes] uint8 on `device`, contiguous."""
        return self._memory

    @property
    def planes(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots: [num_slots, num_layers, kv_heads, block_tokens, dim] each."""
        return self._keys, self._values

    def allocate(self) -> int | None:
        """Take a slot, lowest index first in a fresh pool; None when all are taken."""
        if not self._free:
            return None
        slot_idx = self._free.pop()
        self._is_used[slot_idx] = True
        return slot_idx

    def free(self, slot_idx: int) -> None:
        """Give a slot back; its bytes stay until it is used again.

        Raises:
            ConfigError: the slot is not taken: freeing twice would give it to two owners.
        """
        if not 0 <= slot_idx < self.num_slots or not self._is_used[slot_idx]:
            raise ConfigError(f"slot {slot_idx} is not taken; the pool has {self.num_slots}")
        self._is_used[slot_idx] = False
        self._free.append(slot_idx)

    def slot(self, slot_idx: int) -> Tensor:
        """View a slot's bytes: [slot_nbytes] uint8 on `device`."""
        return self._memory[slot_idx]

    def keys(self, slot_idx: int) -> Tensor:
        """View a slot's keys: [num_layers, kv_heads, block_tokens, key_dim] on `device`."""
        return self._keys[slot_idx]

    def values(self, slot_idx: int) -> Tensor:
        """View a slot's values: [num_layers, kv_heads, block_tokens, value_dim] on `device`."""
        return self._values[slot_idx]
