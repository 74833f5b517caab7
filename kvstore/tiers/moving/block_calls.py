# SPDX-License-Identifier: Apache-2.0
"""Plain blocks of a store folder: the calls of `kvstore.tiers.block_store.BlockStore`, over host and disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kvstore.errors import BusyError, ConfigError, KVStoreError, ReadOnlyError
from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey
from kvstore.telemetry.fault_log import log_fault
from kvstore.tiers.base import Outcome
from kvstore.tiers.data_path import DataPath, WritePath
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.moving.layer_load import LayerLoad
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.reading.request import FetchRequest
from kvstore.tiers.removal import remove_blocks
from kvstore.tiers.slots import check_blocks, check_gets, check_keys
from kvstore.tiers.tables.blocks import has_block

_GROUP_NBYTES = 1 << 20
"""Smaller groups make the first layer come sooner, and all of them later."""


class BlockCalls:
    """The block store that a folder is. Thread-safe.

    Args:
        disk: the open folder.
        data: what moves blocks; None for a store opened without a layout.
    """

    def __init__(self, disk: DiskTier, data: DataPath | None) -> None:
        self._disk = disk
        self._data = data
        self._pid = os.getpid()
        self._is_open = True

    @property
    def is_writable(self) -> bool:
        """Whether this process may write."""
        return self._disk.is_writable

    @property
    def layout(self) -> BlockLayout:
        """Layout of every slot; raises `ConfigError` for a store opened without one."""
        return self._moving().layout

    def put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> list[Outcome]:
        """Store plain blocks until the budget needs their room; what is `STORED` is durable, and putting is idempotent.

        With `put_admission="second-use"` the first put of a block is `STORED` in memory only.

        Args:
            keys: one per block.
            slots: [slot_nbytes] uint8 CPU, contiguous, each.
            num_tokens: tokens in each.
            timeout_s: seconds after which what is not durable yet ends as `TIMED_OUT`; it may still become so.

        Returns:
            Per block: `STORED`, `FULL`, `UNAVAILABLE` when the device failed, or `TIMED_OUT`.

        Raises:
            ShapeError: an argument does not fit.
            ReadOnlyError: the store is open for reading.
        """
        return self.submit_put(keys, slots, num_tokens, timeout_s=timeout_s).outcomes()

    def get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> list[Outcome]:
        """Bring plain blocks into slots: `Store.fetch` without the details, and with a deadline.

        Bytes are read to memory of the store and decoded from there. What is not being decoded when time is up ends as
        `TIMED_OUT`, and its slot is never touched again; a decode under way is waited for, which takes no I/O.
        """
        data = self._moving()
        check_gets(keys, slots, data.layout)
        requests = [FetchRequest(key, slot) for key, slot in zip(keys, slots, strict=True)]
        report = data.fetcher.fetch(requests) if timeout_s is None else data.mover.fetch(requests, timeout_s)
        return report.outcomes

    def submit_put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> BatchTicket:
        """Like `put`, and return at once."""
        self._writing()
        check_blocks(keys, slots, num_tokens, self.layout)
        return self._moving().mover.submit_put(keys, slots, num_tokens, timeout_s)

    def submit_get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> BatchTicket:
        """Like `get`, and return at once."""
        check_gets(keys, slots, self.layout)
        requests = [FetchRequest(key, slot) for key, slot in zip(keys, slots, strict=True)]
        return self._moving().mover.submit_get(requests, timeout_s)

    def load_layers(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        *,
        group_layers: int | None = None,
        on_layers: Callable[[range, Sequence[Outcome]], None] | None = None,
    ) -> LayerLoad:
        """Bring blocks layer by layer, so that attention over the first can begin while the others are read.

        What comes this way does not enter the host tier. Each group of layers is one read per block: a few layers at
        once cost less when layers are small.

        Args:
            keys: the blocks.
            slots: [slot_nbytes] uint8 CPU, contiguous, each; a layer's bytes may be read once its `wait` has returned.
            group_layers: layers that are read at once, at least 1; None for as many as make up 1 MiB of a block.
            on_layers: called when layers have come; see `LayerLoad`.
        """
        check_gets(keys, slots, self.layout)
        num_layers = self.layout.spec.num_layers
        if group_layers is None:
            group_layers = max(1, _GROUP_NBYTES * num_layers // self.layout.slot_nbytes)
        if group_layers < 1:
            raise ConfigError(f"group_layers is {group_layers}; at least one layer comes at a time")
        requests = [FetchRequest(key, slot) for key, slot in zip(keys, slots, strict=True)]
        load = LayerLoad(requests, num_layers, group_layers, on_layers)
        self._moving().mover.submit_layers(load)
        return load

    def prefetch(self, keys: Sequence[BlockKey], priority: int = 0) -> BatchTicket:
        """Bring blocks into the host tier while no other read is under way, and return at once.

        Args:
            keys: blocks that may be asked for soon.
            priority: larger comes first; of equal ones, who asked first.

        Returns:
            A ticket whose outcomes are `HOST` (was there), `DISK` (was brought), `FULL` (no slot, or too many wait),
            or those of any read.
        """
        prefetcher = self._moving().prefetcher
        check_keys(keys)
        return prefetcher.submit(keys, priority)

    def keep(self, keys: Sequence[BlockKey]) -> None:
        """Never evict these blocks from the host tier, as far as they fit half of it; `unkeep` ends that."""
        self._moving().host.keep(keys)

    def unkeep(self, keys: Sequence[BlockKey]) -> None:
        """Undo `keep`."""
        self._moving().host.unkeep(keys)

    def note_attention(self, masses: Mapping[BlockKey, float]) -> None:
        """Tell how much of a question's attention blocks got: eviction by participation keeps those with most."""
        self._moving().host.attend(masses)

    def exists(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Say per block whether memory or disk holds it; does not count as a use. What cannot be asked is not there."""
        self._check_open()
        check_keys(keys)
        on_disk = [False] * len(keys)
        try:
            with self._disk.catalogue.read() as view:
                on_disk = [has_block(view, key) for key in keys]
        except KVStoreError as error:
            log_fault("cannot be asked for blocks", store=str(self._disk.folder), reason=str(error))
        host = None if self._data is None else self._data.host
        return [on or (host is not None and host.contains(key)) for key, on in zip(keys, on_disk, strict=True)]

    def remove(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Remove plain blocks; returns per block whether it was removed.

        Those that a stream needs stay, and so does one that memory alone holds while it is written or read.
        """
        self._check_open(writing=True)
        check_keys(keys)
        try:
            trial = None if self._data is None else self._data.trial
            waiting = [trial is not None and trial.forget(key) for key in keys]
            stored = remove_blocks(self._disk, self._data, keys)
            return [was_waiting or is_removed for was_waiting, is_removed in zip(waiting, stored, strict=True)]
        except KVStoreError as error:
            log_fault("blocks not removed", store=str(self._disk.folder), blocks=len(keys), reason=str(error))
            return [False] * len(keys)

    def _check_open(self, *, writing: bool = False) -> None:
        if not self._is_open:
            raise BusyError(f"{self._disk.folder}: the store is closed")
        if os.getpid() != self._pid:
            raise BusyError(f"{self._disk.folder}: opened by process {self._pid}; open it again in the forked child")
        if writing and not self._disk.is_writable:
            raise ReadOnlyError(f"{self._disk.folder}: open for reading; open it with Access.WRITE")

    def _moving(self) -> DataPath:
        self._check_open()
        if self._data is None:
            raise ConfigError(f"{self._disk.folder}: opened without a layout, so no block can be moved")
        return self._data

    def _writing(self) -> WritePath:
        self._check_open(writing=True)
        write = self._moving().write
        assert write is not None, "a store open for writing has a write path"
        return write
