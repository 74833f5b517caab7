# SPDX-License-Identifier: Apache-2.0
"""The way of blocks between a device pool and host memory: pinned slots, a stream of its own, events in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvstore.native import Arena, copy_to_device
from kvstore.tiers.device.copies import copy_costs
from kvstore.tiers.device.pool import DevicePool

_HALF_NBYTES = 32 << 20


class DeviceLink(Protocol):
    """Brings blocks to the slots of a pool, and takes them from there. The engine's thread owns it."""

    @property
    def batch(self) -> int:
        """Most blocks that are staged at a time."""
        ...

    def stage(self, slot_idxs: Sequence[int]) -> list[Tensor]:
        """Return host memory to fill with the blocks of slots: [slot_nbytes] uint8 CPU each, until the next `send`."""
        ...

    def send(self, filled: Sequence[bool], layers: range) -> None:
        """Copy layers of the staged blocks to their slots; what the engine queues from now on sees them.

        Args:
            filled: which of the staged ones are to go.
            layers: of the blocks; others stay as they are.
        """
        ...

    def take(self, slot_idx: int) -> Tensor:
        """Return the bytes of a slot, as what is queued so far leaves them: [slot_nbytes] uint8 CPU.

        They are the caller's to read until the slot is written again.
        """
        ...


def link_to(pool: DevicePool) -> DeviceLink:
    """Make the link that suits the pool's device."""
    return CudaLink(pool) if pool.device.type == "cuda" else HostLink(pool)


class HostLink:
    """For pools in host memory: blocks are filled where they lie.

    Args:
        pool: the slots.
    """

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool

    @property
    def batch(self) -> int:
        """All slots."""
        return self._pool.num_slots

    def stage(self, slot_idxs: Sequence[int]) -> list[Tensor]:
        """Return the slots themselves."""
        return [self._pool.slot(slot_idx) for slot_idx in slot_idxs]

    def send(self, filled: Sequence[bool], layers: range) -> None:
        """Do nothing: they are there."""

    def take(self, slot_idx: int) -> Tensor:
        """Return the slot itself."""
        return self._pool.slot(slot_idx)


class CudaLink:
    """For pools on a CUDA device. While one half of the pinned memory is on its way, the other is being filled.

    Args:
        pool: the slots.

    Raises:
        CapacityError, StoreIOError: no room for pinned memory.
    """

    @torch.inference_mode(False)  # its memory is written in every mode
    def __init__(self, pool: DevicePool) -> None:
        slot_nbytes = pool.layout.slot_nbytes
        self._pool = pool
        self.batch = max(1, _HALF_NBYTES // slot_nbytes)
        self._arena = Arena(2 * self.batch * slot_nbytes, True)
        self._staged = torch.frombuffer(self._arena, dtype=torch.uint8)[: 2 * self.batch * slot_nbytes]
        self._slots = self._staged.view(2, self.batch, slot_nbytes)
        self._stream = torch.cuda.Stream(pool.device)
        self._sent = [torch.cuda.Event(), torch.cuda.Event()]
        self._half = 0
        self._slot_idxs: list[int] = []

    def stage(self, slot_idxs: Sequence[int]) -> list[Tensor]:
        """Return pinned slots whose last copies have ended; at most `batch`."""
        self._half = 1 - self._half
        self._sent[self._half].synchronize()
        self._slot_idxs = list(slot_idxs)
        return list(self._slots[self._half, : len(slot_idxs)])

    def send(self, filled: Sequence[bool], layers: range) -> None:
        """Queue the copies behind all that the engine has queued, and let the engine wait for them."""
        layout = self._pool.layout
        per_layer = layout.block_tokens * layout.spec.token_nbytes // layout.spec.num_layers
        runs = []
        for staged_idx, (slot_idx, is_filled) in enumerate(zip(self._slot_idxs, filled, strict=True)):
            if is_filled:
                first = (self._half * self.batch + staged_idx) * layout.slot_nbytes
                within = layers.start * per_layer
                runs.append((first + within, slot_idx * layout.slot_nbytes + within, len(layers) * per_layer))
        current = torch.cuda.current_stream(self._pool.device)
        self._stream.wait_stream(current)  # whatever reads or writes these slots now comes first
        place = (self._pool.memory.data_ptr(), self._pool.memory.nbytes)
        costs = copy_costs(_index_of(self._pool.device), to_device=True)
        by_kernel = costs.prefers_kernel(len(runs), sum(nbytes for _, _, nbytes in runs))
        copy_to_device(self._arena, place, runs, by_kernel, self._stream.cuda_stream)
        self._sent[self._half].record(self._stream)
        current.wait_event(self._sent[self._half])

    def take(self, slot_idx: int) -> Tensor:
        """Copy the slot once what writes it has ended, and wait for that."""
        slot = self._pool.slot(slot_idx)
        taken = torch.empty(slot.shape, dtype=slot.dtype, pin_memory=True)  # torch keeps such memory for the next time
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        with torch.cuda.stream(self._stream):
            taken.copy_(slot, non_blocking=True)
        self._stream.synchronize()
        return taken


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
