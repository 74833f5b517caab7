# SPDX-License-Identifier: Apache-2.0
"""Reads blocks from disk: look up, plan, read, decode; again where an extent was reused meanwhile."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from kvstore.errors import CorruptRecordError, KVStoreError, StoreIOError
from kvstore.layout import BlockLayout
from kvstore.native import IoPool
from kvstore.spec import BlockKey
from kvstore.telemetry.fault_log import log_fault
from kvstore.tiers.base import Outcome
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.disk import DiskTier, Found
from kvstore.tiers.reading.decoding import decode_part, decode_whole, plan_piece
from kvstore.tiers.reading.extent_reader import ExtentReader
from kvstore.tiers.reading.plan import Piece
from kvstore.tiers.tables.records import extent_nbytes

_MAX_ROUNDS = 3
# The device, or this process, not the block: what is stored may be whole, and readable later.
_PASSING_ERRNOS = frozenset(
    {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOMEM, errno.EMFILE}
    | {errno.ENFILE, errno.ENOBUFS, errno.EAGAIN, errno.ECANCELED, errno.EDQUOT, errno.EPERM, errno.EACCES}
)

Deliver: TypeAlias = Callable[[int, Callable[[Tensor], None]], None]
"""Called with an item's number and what decodes it into a slot; decides which slot that is, or calls it not at all."""


@dataclass(slots=True)
class Sought:
    """A block that is read.

    Args:
        key: the block.
        layers: layers to bring; None for all.
        asked_at: `HostTier.num_forgotten` before the look-up; see `Lease.publish`.
        outcome: how it ended, unless well.
        fault: why the last attempt failed.
        is_delivered: whether it was decoded, for whomever.
        decode_s: seconds of checking and decoding.
    """

    key: BlockKey
    layers: range | None
    asked_at: int
    outcome: Outcome | None = None
    fault: KVStoreError | None = None
    is_delivered: bool = False
    decode_s: float = 0.0
    found: Found | None = None


class BlockReader:
    """Reads batches of blocks. Thread-safe; several batches share the staging memory.

    Args:
        disk: the disk tier.
        codecs: decode.
        layout: layout of the destination slots.
        pool: moves the bytes.
        decoders: threads that decode.
    """

    def __init__(
        self, disk: DiskTier, codecs: CodecShelf, layout: BlockLayout, pool: IoPool, decoders: Executor
    ) -> None:
        self._disk = disk
        self._codecs = codecs
        self._extents = ExtentReader(disk.files, pool, decoders, extent_nbytes(codecs.bound(layout.block_tokens)))
        self.damaged: set[BlockKey] = set()
        """Blocks seen damaged: the writer replaces them when they are appended again."""

    def read(self, items: dict[int, Sought], deliver: Deliver) -> int:
        """Read blocks; afterwards each is delivered, has an outcome, or was wanted by nobody any more.

        Returns:
            Bytes read from the device.
        """
        nbytes = 0
        pending = self._look_up(items)
        for attempt in range(_MAX_ROUNDS):
            nbytes += self._read_once(pending, deliver)
            faulty = {number: item for number, item in pending.items() if item.fault is not None}
            if not faulty:
                break
            # The extent may have been freed and used again since the look-up: then the catalogue says so now.
            seen = {number: item.found for number, item in faulty.items()}
            pending = self._look_up(faulty)
            for number, item in list(pending.items()):
                if item.found == seen[number]:
                    self._give_up(pending.pop(number))
                elif attempt == _MAX_ROUNDS - 1:
                    pending.pop(number).outcome = Outcome.MISS  # moved under every attempt
        return nbytes

    def close(self) -> None:
        """Give the staging memory back."""
        self._extents.close()

    def _give_up(self, item: Sought) -> None:
        self.damaged.add(item.key)  # bad sectors too: written again, the block lies elsewhere
        is_passing = isinstance(item.fault, StoreIOError) and item.fault.errno in _PASSING_ERRNOS
        item.outcome = Outcome.UNAVAILABLE if is_passing else Outcome.DAMAGED
        where, why = str(self._disk.folder), str(item.fault)
        log_fault(f"block {item.outcome}", store=where, key=item.key.hex(), reason=why)

    def _look_up(self, items: dict[int, Sought]) -> dict[int, Sought]:
        """Find items in the catalogue; returns those to read."""
        found = self._disk.look_up(
            [item.key for item in items.values()], [item.layers is not None for item in items.values()]
        )
        readable: dict[int, Sought] = {}
        for (number, item), result in zip(items.items(), found, strict=True):
            if isinstance(result, KVStoreError):
                item.fault = result
                self._give_up(item)
            elif result is None:
                item.outcome = Outcome.MISS
            else:
                item.found = result
                readable[number] = item
        return readable

    def _read_once(self, items: dict[int, Sought], deliver: Deliver) -> int:
        pieces: list[Piece] = []
        for number, item in items.items():
            item.fault = None
            try:
                pieces.append(self._plan(number, item))
            except KVStoreError as error:
                item.fault = error

        def fail(piece: Piece, error: KVStoreError) -> None:
            items[piece.item].fault = error

        def consume(piece: Piece, data: memoryview) -> None:
            item = items[piece.item]
            try:
                deliver(piece.item, lambda slot: self._decode(item, piece, data, slot))
            except KVStoreError as error:
                item.fault = error

        return self._extents.read(pieces, consume, fail)

    def _plan(self, number: int, item: Sought) -> Piece:
        assert item.found is not None, "planned after the look-up"
        extent = item.found.record.extent
        if extent.nbytes > self._extents.capacity_nbytes:
            raise CorruptRecordError(f"extent of {extent.nbytes} bytes: larger than any block of this layout")
        return plan_piece(number, item.found, item.layers)

    def _decode(self, item: Sought, piece: Piece, data: memoryview, slot: Tensor) -> None:
        began_s = time.perf_counter()
        assert item.found is not None, "decoded after the look-up"
        try:
            if item.layers is None:
                decode_whole(self._codecs, item.key, item.found, data, slot)
            else:
                decode_part(self._codecs, item.found, item.layers, piece, data, slot)
            item.is_delivered = True
        finally:
            item.decode_s += time.perf_counter() - began_s
