# SPDX-License-Identifier: Apache-2.0
"""Reads blocks from disk: look up, plan, read, decode; again where an extent was reused meanwhile."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from kvstore.errors import CorruptRecordError, KVStoreError, StoreIOError
from kvstore.layout import BlockLayout
from kvstore.native import IoPool
from kvstore.spec import BlockKey
from kvstore.telemetry.fault_log import log_fault
from kvstore.tiers.base import Outcome
from kvstore.tiers.codec_shelf import CodecShelf, ExtentInMemory
from kvstore.tiers.disk import DiskTier, Found
from kvstore.tiers.reading.decoding import decode_part, decode_whole, plan_piece
from kvstore.tiers.reading.extent_reader import ExtentReader
from kvstore.tiers.reading.plan import Piece
from kvstore.tiers.tables.records import extent_nbytes

_MAX_ROUNDS = 3
_FIRST_BLOCKS = 8
# The device, or this process, not the block: what is stored may be whole, and readable later.
_PASSING_ERRNOS = frozenset(
    {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOMEM, errno.EMFILE}
    | {errno.ENFILE, errno.ENOBUFS, errno.EAGAIN, errno.ECANCELED, errno.EDQUOT, errno.EPERM, errno.EACCES}
)

Decode: TypeAlias = Callable[[Mapping[int, Tensor]], list[int]]
"""Decodes items, by their numbers, into slots; returns those that came whole."""

Deliver: TypeAlias = Callable[[Sequence[int], Decode], None]
"""Called with numbers of items whose bytes are here, and what decodes them; decides into which slots, if any."""


@dataclass(slots=True)
class Sought:
    """A block that is read.

    Args:
        key: the block.
        layers: layers to bring; None for all.
        outcome: how it ended, unless well.
        fault: why the last attempt failed.
        is_delivered: whether it was decoded, for whomever.
    """

    key: BlockKey
    layers: range | None
    outcome: Outcome | None = None
    fault: KVStoreError | None = None
    is_delivered: bool = False
    found: Found | None = None


class ReadCost(NamedTuple):
    """What a batch took: bytes read from the device; seconds of checking and decoding, summed over threads."""

    nbytes: int
    decode_s: float


class BlockReader:
    """Reads batches of blocks. Thread-safe; several batches share the staging memory.

    Args:
        disk: the disk tier.
        codecs: decode.
        layout: layout of the destination slots.
        pool: moves the bytes.
        decoders: threads that decode, beside those that read.
    """

    def __init__(
        self, disk: DiskTier, codecs: CodecShelf, layout: BlockLayout, pool: IoPool, decoders: Executor
    ) -> None:
        self._disk = disk
        self._codecs = codecs
        most_helpers = disk.config.decode_threads - 1  # who reads decodes too
        largest_nbytes = extent_nbytes(codecs.bound(layout.block_tokens))
        self._extents = ExtentReader(disk.files, pool, decoders, most_helpers, largest_nbytes)
        self.damaged: set[BlockKey] = set()
        """Blocks seen damaged: the writer replaces them when they are appended again."""

    def read(self, items: dict[int, Sought], deliver: Deliver) -> ReadCost:
        """Read blocks; afterwards each is delivered, has an outcome, or was wanted by nobody any more."""
        nbytes = 0
        spans_s: list[float] = []
        parts: Iterable[dict[int, Sought]] = map(self._look_up, _parts(items))
        for attempt in range(_MAX_ROUNDS):
            nbytes += self._read_once(items, parts, deliver, spans_s)
            faulty = {at: item for at, item in items.items() if item.fault is not None and item.outcome is None}
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
            parts = [pending]
        return ReadCost(nbytes, sum(spans_s))

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

    def _read_once(
        self, items: dict[int, Sought], parts: Iterable[dict[int, Sought]], deliver: Deliver, spans_s: list[float]
    ) -> int:
        def fail(piece: Piece, error: KVStoreError) -> None:
            items[piece.item].fault = error

        def consume(ready: Sequence[tuple[Piece, int]]) -> None:
            placed = {each[0].item: each for each in ready}

            def decode(slots: Mapping[int, Tensor]) -> list[int]:
                began_s = time.perf_counter()
                try:
                    return self._decode([(items[number], placed[number], slot) for number, slot in slots.items()])
                finally:
                    spans_s.append(time.perf_counter() - began_s)

            deliver(list(placed), decode)

        return self._extents.read(map(self._plan, parts), consume, fail)

    def _plan(self, items: dict[int, Sought]) -> list[Piece]:
        pieces: list[Piece] = []
        capacity_nbytes = self._extents.capacity_nbytes
        for number, item in items.items():
            assert item.found is not None, "planned after the look-up"
            item.fault = None
            try:
                nbytes = item.found.record.extent.nbytes
                if nbytes > capacity_nbytes:
                    raise CorruptRecordError(f"extent of {nbytes} bytes: larger than any block of this layout")
                pieces.append(plan_piece(number, item.found, item.layers))
            except KVStoreError as error:
                item.fault = error
        return pieces

    def _decode(self, wanted: list[tuple[Sought, tuple[Piece, int], Tensor]]) -> list[int]:
        """Whole blocks in one call; one by one what that leaves, as it needs Python or has a fault, and layers."""
        whole = [each for each in wanted if each[0].layers is None]
        left: list[int] = []
        if whole:
            extents = [_in_memory(*each) for each in whole]
            began_s = time.thread_time()
            left = self._codecs.decode_extents(self._extents.memory, extents)
            self._extents.pace.note(sum(extent[1] for extent in extents), time.thread_time() - began_s)
        single = [whole[number] for number in left] + [each for each in wanted if each[0].layers is not None]
        for item, (piece, start), slot in single:
            assert item.found is not None, "decoded after the look-up"
            data = memoryview(self._extents.memory)[start : start + piece.end - piece.start]
            try:
                if item.layers is None:
                    decode_whole(self._codecs, item.key, item.found, data, slot)
                else:
                    decode_part(self._codecs, item.found, item.layers, piece, data, slot)
            except KVStoreError as error:
                item.fault = error
        came: list[int] = []
        for item, (piece, _), _ in wanted:
            if item.fault is None:
                item.is_delivered = True
                came.append(piece.item)
        return came


def _parts(items: dict[int, Sought]) -> list[dict[int, Sought]]:
    """Cut a batch in two: the device begins with the first part while the second one is looked up."""
    if len(items) <= _FIRST_BLOCKS:
        return [items]
    numbered = list(items.items())
    return [dict(numbered[:_FIRST_BLOCKS]), dict(numbered[_FIRST_BLOCKS:])]


def _in_memory(item: Sought, placed: tuple[Piece, int], slot: Tensor) -> ExtentInMemory:
    assert item.found is not None, "decoded after the look-up"
    record, (piece, start) = item.found.record, placed
    extent_nbytes = piece.end - piece.start
    return start, extent_nbytes, item.key, record.generation, record.record_nbytes, record.num_tokens, slot.data_ptr()
