# SPDX-License-Identifier: Apache-2.0
"""Moves blocks from disk and host into the slots of a caller: plan, merge, read, decode while more is being read.

A fault concerns the item that has it, never the batch: the item is read alone, looked up again, and ends as a miss or
as damaged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from torch import Tensor

from kvstore.codec import Codec, plane_span
from kvstore.errors import CorruptRecordError, KVStoreError
from kvstore.layout import BlockLayout
from kvstore.native import IoPool
from kvstore.spec import BlockKey
from kvstore.stats import Meter, TierStats
from kvstore.tiers.base import Outcome, Tier
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.disk import DiskTier, Found
from kvstore.tiers.host import HostTier
from kvstore.tiers.reading.extent_reader import ExtentReader
from kvstore.tiers.reading.plan import Piece, part_piece, whole_piece
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, extent_nbytes, unpack_extent_header

_MAX_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """One block to be brought.

    Args:
        key: the block.
        slot: [slot_nbytes] uint8 CPU, contiguous; where it goes.
        layers: layers to bring, a range with step 1; None for all. Other layers of the slot stay as they are.
    """

    key: BlockKey
    slot: Tensor
    layers: range | None = None


@dataclass(slots=True)
class FetchReport:
    """What became of a batch.

    Args:
        outcomes: one per request, in order.
        bytes_read: bytes copied from the host tier and bytes read from disk, padding and merged gaps included.
        load_s: wall seconds of the whole batch.
        decode_s: seconds of checking and decoding, summed over threads.
        reasons: why an item is damaged, by its position in the batch.
    """

    outcomes: list[Outcome]
    bytes_read: dict[Tier, int] = field(default_factory=lambda: {Tier.HOST: 0, Tier.DISK: 0})
    load_s: float = 0.0
    decode_s: float = 0.0
    reasons: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Item:
    """One request on its way: where its bytes are, and the fault of its last attempt."""

    request: FetchRequest
    found: Found | None = None
    layers: range | None = None
    fault: str | None = None
    decode_s: float = 0.0


class Fetcher:
    """Fetches batches of blocks. Thread-safe; several batches share the staging memory.

    Args:
        disk: the disk tier.
        host: the host tier: serves what it holds, takes what was read whole.
        codecs: decode.
        layout: layout of the destination slots.
        pool: moves the bytes.
        decoders: threads that decode.
    """

    def __init__(
        self, disk: DiskTier, host: HostTier, codecs: CodecShelf, layout: BlockLayout, pool: IoPool, decoders: Executor
    ) -> None:
        self._disk = disk
        self._host = host
        self._codecs = codecs
        self._layout = layout
        self._reader = ExtentReader(disk.files, pool, decoders, extent_nbytes(codecs.bound(layout.block_tokens)))
        self.host_meter = Meter()
        self.damaged: set[BlockKey] = set()
        """Blocks seen damaged: the writer replaces them when they are appended again."""

    def fetch(self, requests: Sequence[FetchRequest]) -> FetchReport:
        """Bring blocks into their slots; see `Store.fetch`."""
        began_s = time.perf_counter()
        report = FetchReport([Outcome.MISS] * len(requests))
        items: dict[int, _Item] = {}
        for position, request in enumerate(requests):
            if self._copy_from_host(request, report):
                report.outcomes[position] = Outcome.HOST
            else:
                items[position] = _Item(request, layers=self._part(request))
        if items:
            self._fetch_from_disk(items, report)
        report.load_s = time.perf_counter() - began_s
        self._count(report)
        self._disk.note_use(
            request.key for request, outcome in zip(requests, report.outcomes, strict=True) if outcome.is_hit
        )
        return report

    def close(self) -> None:
        """Give the staging memory back."""
        self._reader.close()

    def _part(self, request: FetchRequest) -> range | None:
        """Layers to read alone; None when the whole block is wanted."""
        if request.layers is None or len(request.layers) == self._layout.spec.num_layers:
            return None
        return request.layers

    def _copy_from_host(self, request: FetchRequest, report: FetchReport) -> bool:
        lease = self._host.pin(request.key)
        if lease is None:
            return False
        with lease:
            start, nbytes = self._layer_bytes(request.layers)
            request.slot[start : start + nbytes].copy_(lease.slot[start : start + nbytes])
        report.bytes_read[Tier.HOST] += nbytes
        return True

    def _layer_bytes(self, layers: range | None) -> tuple[int, int]:
        if layers is None:
            return 0, self._layout.slot_nbytes
        per_layer = self._layout.block_tokens * self._layout.spec.token_nbytes // self._layout.spec.num_layers
        return layers.start * per_layer, len(layers) * per_layer

    def _fetch_from_disk(self, items: dict[int, _Item], report: FetchReport) -> None:
        pending = self._look_up(items, report)
        for attempt in range(_MAX_ROUNDS):
            self._read(pending, report)
            faulty = {position: item for position, item in pending.items() if item.fault is not None}
            for position in pending.keys() - faulty.keys():
                report.outcomes[position] = Outcome.DISK
            if not faulty:
                break
            # The extent may have been freed and used again since the look-up: then the catalogue says so now.
            seen = {position: item.found for position, item in faulty.items()}
            pending = self._look_up(faulty, report)
            for position, item in list(pending.items()):
                if item.found == seen[position] or attempt == _MAX_ROUNDS - 1:
                    del pending[position]
                    self._give_up(position, item, item.found != seen[position], report)
        report.decode_s = sum(item.decode_s for item in items.values())

    def _give_up(self, position: int, item: _Item, is_moving: bool, report: FetchReport) -> None:
        if is_moving:
            report.outcomes[position] = Outcome.MISS
            return
        report.outcomes[position] = Outcome.DAMAGED
        report.reasons[position] = item.fault or "unreadable"
        self.damaged.add(item.request.key)

    def _look_up(self, items: dict[int, _Item], report: FetchReport) -> dict[int, _Item]:
        """Find items in the catalogue; returns those to read, and settles the others."""
        positions = list(items)
        found = self._disk.look_up(
            [items[position].request.key for position in positions],
            [items[position].layers is not None for position in positions],
        )
        readable: dict[int, _Item] = {}
        for position, result in zip(positions, found, strict=True):
            if isinstance(result, KVStoreError):
                items[position].fault = str(result)
                self._give_up(position, items[position], False, report)
            elif result is None:
                report.outcomes[position] = Outcome.MISS
            else:
                items[position].found = result
                readable[position] = items[position]
        return readable

    def _read(self, items: dict[int, _Item], report: FetchReport) -> None:
        pieces: list[Piece] = []
        for position, item in items.items():
            item.fault = None
            try:
                pieces.append(self._piece(position, item))
            except KVStoreError as error:
                item.fault = str(error)

        def fail(piece: Piece, error: KVStoreError) -> None:
            items[piece.item].fault = str(error)

        report.bytes_read[Tier.DISK] += self._reader.read(
            pieces, lambda piece, data: self._decode(items[piece.item], piece, data), fail
        )

    def _piece(self, position: int, item: _Item) -> Piece:
        assert item.found is not None, "a piece is planned after the look-up"
        extent = item.found.record.extent
        if extent.nbytes > self._reader.capacity_nbytes:
            raise CorruptRecordError(f"extent of {extent.nbytes} bytes: larger than any block of this layout")
        if item.layers is None:
            return whole_piece(position, extent)
        if item.found.directory is None:
            raise CorruptRecordError("the catalogue holds the block and not its plane directory")
        offset, nbytes = plane_span(Codec.probe(item.found.directory), item.layers)
        return part_piece(position, extent, offset, nbytes)

    def _decode(self, item: _Item, piece: Piece, data: memoryview) -> None:
        """Check and decode one item from the bytes of its piece; its fault is kept, not raised."""
        began_s = time.perf_counter()
        try:
            assert item.found is not None, "decoded after the look-up"
            if item.layers is None:
                self._decode_whole(item.request, item.found, data)
            else:
                assert item.found.directory is not None, "planned with its directory"
                info = Codec.probe(item.found.directory)
                skipped = EXTENT_HEADER_NBYTES - (piece.start - item.found.record.extent.offset)
                offset = max(0, -skipped)
                codec = self._codecs.decoder(info)
                codec.decode_planes(info, data[max(0, skipped) :], offset, item.request.slot, layers=item.layers)
        except KVStoreError as error:
            item.fault = str(error)
        item.decode_s += time.perf_counter() - began_s
        if item.layers is None and item.fault is None:
            self._admit(item.request)

    def _decode_whole(self, request: FetchRequest, found: Found, data: memoryview) -> None:
        record = found.record
        header = unpack_extent_header(data)
        if (header.key, header.generation, header.record_nbytes) != (
            request.key,
            record.generation,
            record.record_nbytes,
        ):
            raise CorruptRecordError("the extent holds another record than the catalogue says")
        body = data[EXTENT_HEADER_NBYTES : EXTENT_HEADER_NBYTES + record.record_nbytes]
        info = Codec.probe(body)
        if info.num_tokens != record.num_tokens:
            raise CorruptRecordError(f"record holds {info.num_tokens} tokens; {record.num_tokens} were expected")
        self._codecs.decoder(info).decode_planes(info, body, 0, request.slot, layers=range(info.num_layers))

    def _admit(self, request: FetchRequest) -> None:
        """Keep a copy in the host tier if a slot can be had without waiting."""
        if self._host.contains(request.key):
            return
        lease = self._host.try_reserve(request.key)
        if lease is None:
            return
        with lease:
            lease.slot.copy_(request.slot)
            lease.publish()

    def _count(self, report: FetchReport) -> None:
        outcomes = report.outcomes
        num_host = outcomes.count(Outcome.HOST)
        self.host_meter.add(
            TierStats(
                hits=num_host,
                misses=len(outcomes) - num_host,
                read_blocks=num_host,
                read_nbytes=report.bytes_read[Tier.HOST],
            )
        )
        num_disk = outcomes.count(Outcome.DISK)
        self._disk.meter.add(
            TierStats(
                hits=num_disk,
                misses=outcomes.count(Outcome.MISS),
                damaged=outcomes.count(Outcome.DAMAGED),
                read_blocks=num_disk,
                read_nbytes=report.bytes_read[Tier.DISK],
                read_s=report.load_s if num_disk else 0.0,
                decode_s=report.decode_s,
            )
        )
