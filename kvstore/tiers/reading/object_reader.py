# SPDX-License-Identifier: Apache-2.0
"""Reads objects of streams: where their parts are, and the parts that are asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.errors import ConfigError, CorruptRecordError, KVStoreError, UnsupportedFormatError
from kvstore.native import IoPool
from kvstore.spec import BlockKey
from kvstore.stats import TierStats
from kvstore.telemetry.fault_log import log_fault
from kvstore.tiers.catalogue import ReadView
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.reading.body_reader import BodyReader, Slice
from kvstore.tiers.tables.blocks import find_sound
from kvstore.tiers.tables.object_body import ObjectEntry, PartTable, check_kind, check_number, unpack_head, unpack_table
from kvstore.tiers.tables.object_rows import ObjectRow
from kvstore.tiers.tables.objects import find_object, object_rows
from kvstore.tiers.tables.records import BlockRecord
from kvstore.tiers.tables.streams import find_stream_id

_MAX_ROUNDS = 3
_MAX_KEPT_PARTS = 1 << 20
_LOOKED_UP = 8
"""Objects of one transaction: each brings in a hundred KiB of the catalogue, which goes only between transactions."""


class _Place(NamedTuple):
    """An object as the catalogue has it."""

    row: ObjectRow
    record: BlockRecord


@dataclass(slots=True)
class _Reading:
    """One object, and what has come of it."""

    index: int
    asked: Sequence[int] | None
    place: _Place | None = None
    table: PartTable | None = None
    parts: dict[int, bytes] = field(default_factory=dict)

    def move(self, place: _Place | None) -> bool:
        """Go on from what the catalogue says now; returns whether there is something to read that was not tried."""
        known, self.place = self.place, place
        if known is None or place is None or place.row.body != known.row.body:
            self.table = None
            self.parts.clear()  # parts of two objects do not mix
        return place is not None and place != known

    def wanted(self) -> Sequence[int]:
        """Parts that were asked for."""
        return self.asked if self.asked is not None else range(0 if self.table is None else len(self.table.sizes))

    def slices(self) -> dict[int, Slice]:
        """Where the parts are that have not come."""
        table, place = self.table, self.place
        if table is None or place is None:
            return {}
        return {
            part: Slice(place.record.extent, table.starts[part], table.sizes[part], table.checksums[part])
            for part in self.wanted()
            if part < len(table.sizes) and part not in self.parts
        }

    def is_done(self) -> bool:
        """Whether everything that there is has come."""
        return self.table is not None and not self.slices()


class ObjectReader:
    """Reads objects of one store, in any process. Thread-safe.

    Args:
        disk: the store.
        pool: moves the bytes.
    """

    def __init__(self, disk: DiskTier, pool: IoPool) -> None:
        self._disk = disk
        self._bodies = BodyReader(disk.files, pool)
        self._lock = threading.Lock()
        self._tables: dict[BlockKey, PartTable] = {}  # long ones, by body: a key never stands for other bytes

    def entries(self, name: str, kind: str) -> list[ObjectEntry]:
        """See `Store.objects`."""
        for _ in range(_MAX_ROUNDS):
            with self._disk.catalogue.read() as view:
                rows = object_rows(view, find_stream_id(view, name), kind)
                readings = [_Reading(row.index, (), self._place(view, row)) for row in rows]
            self._load_tables(readings)
            if all(each.is_done() for each in readings if each.place is not None):
                break  # else a writer may have moved or replaced one since the look-up
        return [
            ObjectEntry(row.index, row.num_blocks, tuple(each.table.sizes))
            for row, each in zip(rows, readings, strict=True)
            if each.table is not None
        ]

    def read(
        self, name: str, kind: str, wanted: Sequence[tuple[int, Sequence[int] | None]]
    ) -> list[list[bytes | None]]:
        """See `Store.read_objects`."""
        check_kind(kind)
        for index, parts in wanted:
            check_number("index", index)
            if parts is not None and min(parts, default=0) < 0:
                raise ConfigError(f"object {kind} {index}: part {min(parts)}; parts are counted from 0")
        began_s = time.perf_counter()
        readings = [_Reading(index, parts) for index, parts in wanted]
        pending = readings
        nbytes = 0
        for _ in range(_MAX_ROUNDS):
            # A writer may have moved or replaced them since the look-up: then the catalogue says so now.
            changed = self._look_up(name, kind, pending)
            if not changed:
                break
            nbytes += self._load_tables(changed) + self._read_parts(changed)
            pending = [each for each in pending if not each.is_done()]
        damaged = [each.index for each in pending if each.place is not None]
        if damaged:
            where = {"store": str(self._disk.folder), "stream": name, "kind": kind}
            log_fault("objects damaged", **where, objects=len(damaged), first=damaged[0])
        self._disk.meter.add(TierStats(read_nbytes=nbytes, read_s=time.perf_counter() - began_s))
        return [[each.parts.get(part) for part in each.wanted()] for each in readings]

    def close(self) -> None:
        """Give the memory back."""
        self._bodies.close()

    def _look_up(self, name: str, kind: str, readings: Sequence[_Reading]) -> list[_Reading]:
        """Ask the catalogue where objects are; returns those to read."""
        changed: list[_Reading] = []
        for first in range(0, max(len(readings), 1), _LOOKED_UP):
            with self._disk.catalogue.read() as view:
                stream_id = find_stream_id(view, name)
                for each in readings[first : first + _LOOKED_UP]:
                    place: _Place | None = None
                    with suppress(CorruptRecordError, UnsupportedFormatError):
                        row = find_object(view, stream_id, kind, each.index)
                        place = None if row is None else self._place(view, row)
                    if each.move(place):
                        changed.append(each)
        return changed

    def _place(self, view: ReadView, row: ObjectRow) -> _Place | None:
        record = find_sound(view, row.body)
        if record is None or not record.is_object or self._disk.files.is_away(record.extent.file_id):
            return None
        return _Place(row, record)

    def _load_tables(self, readings: Sequence[_Reading]) -> int:
        """Find where parts are: the row says so, or memory, or the disk; returns bytes read."""
        absent: list[tuple[_Reading, _Place]] = []
        for each in readings:
            if each.place is None or each.table is not None:
                continue
            each.table = self._tables.get(each.place.row.body)
            if each.table is None and each.place.row.has_table:
                each.table = _unpack(each.place, each.place.row.first)
            elif each.table is None:
                absent.append((each, each.place))
        if not absent:
            return 0
        wanted = [Slice(place.record.extent, 0, unpack_head(place.row.first).table_end, None) for _, place in absent]
        found, nbytes = self._bodies.read(wanted)
        for (each, place), data in zip(absent, found, strict=True):
            if data is not None and data.startswith(place.row.first):
                each.table = _unpack(place, data)
                self._keep(place.row.body, each.table)
        return nbytes

    def _keep(self, body: BlockKey, table: PartTable | None) -> None:
        with self._lock:
            if table is not None:
                self._tables[body] = table
            while sum(len(each.sizes) for each in self._tables.values()) > _MAX_KEPT_PARTS:
                del self._tables[next(iter(self._tables))]

    def _read_parts(self, readings: Sequence[_Reading]) -> int:
        """Read what has not come, in one batch; returns bytes read."""
        wanted = [(each, part, place) for each in readings for part, place in each.slices().items()]
        found, nbytes = self._bodies.read([place for _, _, place in wanted])
        for (each, part, _), data in zip(wanted, found, strict=True):
            if data is not None:
                each.parts[part] = data
        return nbytes


def _unpack(place: _Place, data: bytes) -> PartTable | None:
    """The table at the beginning of a body; None for one that is damaged, or of another body."""
    with suppress(KVStoreError):
        table = unpack_table(data)
        return table if table.starts[-1] == place.record.record_nbytes else None
    return None
