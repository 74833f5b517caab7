# SPDX-License-Identifier: Apache-2.0
"""Verification: reads every block and object from disk, checks and decodes it, and checks that the tables agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from kvstore.codec import Codec, RecordInfo
from kvstore.errors import CorruptRecordError, KVStoreError, SpecMismatchError, StoreIOError
from kvstore.layout import BlockLayout
from kvstore.native import Arena, IoPool
from kvstore.spec import BLOCK_KEY_NBYTES, BlockKey, ModelSpec
from kvstore.tiers.catalogue import ReadView, Table
from kvstore.tiers.disk import DiskTier, Found
from kvstore.tiers.reading.extent_check import record_in
from kvstore.tiers.tables.blocks import find_block, has_block
from kvstore.tiers.tables.object_body import check_body
from kvstore.tiers.tables.object_rows import ObjectRow, every_row, stream_prefix
from kvstore.tiers.tables.records import Entry
from kvstore.tiers.tables.streams import StreamRow, every_stream, find_state, find_stream, read_entries
from kvstore.tiers.upkeep.accounting import ByteAccount, TableCheck

_KEYS_PER_READ = 1024
_MAX_EXTENT_NBYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class BlockFault:
    """A block, or the body of an object, that cannot be read, and where it is needed.

    `stream`, `index`, `start_s` and `end_s` are None for a block that no stream refers to; all but `stream` are None
    for an object, which `reason` names.
    """

    key: BlockKey
    reason: str
    stream: str | None = None
    index: int | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(slots=True)
class VerifyReport:
    """What a verification found.

    Args:
        num_blocks: blocks and bodies of objects read and checked.
        nbytes: bytes read.
        num_streams: manifests walked.
        faults: damaged or missing blocks and objects, once per stream entry that needs them.
        structure: contradictions between the tables, and bytes that nobody owns.
        account: where the bytes of the extent files are; None for a single stream.
    """

    num_blocks: int = 0
    nbytes: int = 0
    num_streams: int = 0
    faults: list[BlockFault] = field(default_factory=list)
    structure: list[str] = field(default_factory=list)
    account: ByteAccount | None = None

    @property
    def is_clean(self) -> bool:
        """True when nothing is wrong."""
        return not self.faults and not self.structure


class Verifier:
    """Checks one store. Holds one extent and one slot in memory.

    Args:
        disk: the store.
        pool: moves the bytes.
        progress: called with blocks done and blocks in all.
    """

    def __init__(self, disk: DiskTier, pool: IoPool, progress: Callable[[int, int], None] | None) -> None:
        self._disk = disk
        self._pool = pool
        self._progress = progress
        self._arena: Arena | None = None
        self._codecs: dict[tuple[object, ...], tuple[Codec, Tensor]] = {}
        self._report = VerifyReport()

    def stream(self, name: str) -> VerifyReport:
        """Check the blocks of one stream; raises `StreamNotFoundError` when there is none of that name."""
        with self._disk.catalogue.read() as view:
            row = find_stream(view, name)
            entries = self._entries(view, row)
            objects = self._objects(view, row, len(entries))
        keys = list(dict.fromkeys((*(entry.key for entry in entries), *(each.body for each in objects))))
        reasons = self._check_blocks(iter(keys), len(keys))
        self._name_faults(row, entries, objects, reasons)
        return self._report

    def everything(self) -> VerifyReport:
        """Check all blocks, all manifests, and the tables against each other."""
        with self._disk.catalogue.read() as view:
            total = view.count(Table.BLOCKS)
        reasons = self._check_blocks(self._all_keys(), total)
        needed: Counter[BlockKey] = Counter()
        bodies: Counter[BlockKey] = Counter()
        # Between batches the writer's free list and the catalogue must tell the same story.
        with self._disk.mutation, self._disk.catalogue.read() as view:
            for row in self._rows(view):
                entries = self._entries(view, row)
                objects = self._objects(view, row, len(entries))
                needed.update(entry.key for entry in entries)
                bodies.update(each.body for each in objects)
                for key in (*(entry.key for entry in entries), *(each.body for each in objects)):
                    if not has_block(view, key):
                        reasons[key] = "the block is not stored"
                self._name_faults(row, entries, objects, reasons)
            tables = TableCheck(self._disk, view, needed, bodies)
            tables.run()
        self._report.structure.extend(tables.problems)
        self._report.account = tables.account
        self._report.faults.extend(
            BlockFault(key, reason) for key, reason in reasons.items() if key not in needed and key not in bodies
        )
        return self._report

    def _all_keys(self) -> Iterator[BlockKey]:
        start = b""
        while True:
            with self._disk.catalogue.read() as view:
                keys = [key for key, _ in islice(view.scan(Table.BLOCKS, start=start), _KEYS_PER_READ)]
            if not keys:
                return
            # What is no key is no block either; the check of the tables reports it.
            yield from (BlockKey(key) for key in keys if len(key) == BLOCK_KEY_NBYTES)
            start = keys[-1] + b"\0"

    def _rows(self, view: ReadView) -> list[StreamRow]:
        rows: list[StreamRow] = []
        for _, row in every_stream(view):
            if isinstance(row, StreamRow):
                rows.append(row)
            else:
                self._report.structure.append(str(row))
        return rows

    def _entries(self, view: ReadView, row: StreamRow) -> list[Entry]:
        self._report.num_streams += 1
        name, entries = row.header.name, []
        try:
            entries = list(read_entries(view, row.stream_id))
            state = find_state(view, row.stream_id)
        except KVStoreError as error:
            self._report.structure.append(f"stream {name!r}: {error}")
            return entries
        if [entry.index for entry in entries] != list(range(state.num_entries)):
            self._report.structure.append(f"stream {name!r}: {len(entries)} entries, {state.num_entries} announced")
        if sum(entry.num_tokens for entry in entries) != state.num_tokens:
            self._report.structure.append(f"stream {name!r}: its entries do not add up to {state.num_tokens} tokens")
        return entries

    def _objects(self, view: ReadView, row: StreamRow, num_entries: int) -> list[ObjectRow]:
        name, objects = row.header.name, []
        for _, each in every_row(view, stream_prefix(row.stream_id)):
            if not isinstance(each, ObjectRow):
                self._report.structure.append(f"stream {name!r}: {each}")
                continue
            objects.append(each)
            if each.num_blocks > num_entries:
                self._report.structure.append(
                    f"stream {name!r}: object {each.kind} {each.index} describes {each.num_blocks} blocks, "
                    f"{num_entries} are there"
                )
        return objects

    def _name_faults(
        self, row: StreamRow, entries: list[Entry], objects: list[ObjectRow], reasons: dict[BlockKey, str]
    ) -> None:
        for entry in entries:
            reason = reasons.get(entry.key)
            if reason is not None:
                self._report.faults.append(
                    BlockFault(entry.key, reason, row.header.name, entry.index, entry.start_s, entry.end_s)
                )
        for each in objects:
            if each.body in reasons:
                reason = f"object {each.kind} {each.index}: {reasons[each.body]}"
                self._report.faults.append(BlockFault(each.body, reason, row.header.name))

    def _check_blocks(self, keys: Iterator[BlockKey], total: int) -> dict[BlockKey, str]:
        reasons: dict[BlockKey, str] = {}
        for done, key in enumerate(keys, start=1):
            fault = self.block(key)
            if fault is not None:
                reasons[key] = str(fault)
            self._report.num_blocks += 1
            if self._progress is not None:
                self._progress(done, max(done, total))
        return reasons

    def block(self, key: BlockKey) -> KVStoreError | None:
        """Return why a block cannot be read; None when it is sound, or when a writer changed it meanwhile.

        A `CorruptRecordError` says that its bytes or its entry are damaged, or gone; other errors, that they cannot be
        read or decoded here and now.
        """
        before: Found | KVStoreError | None = None
        while True:
            found = self._disk.look_up([key], [True])[0]
            if isinstance(found, KVStoreError):
                return found
            if found is None:
                return self._why_missing(key) if before is None else None
            try:
                self._read_block(key, found)
            except KVStoreError as error:
                if found == before:
                    return error
                before = found
            else:
                return None

    def _why_missing(self, key: BlockKey) -> KVStoreError:
        with self._disk.catalogue.read() as view:
            record = find_block(view, key)
        if record is not None and self._disk.files.is_away(record.extent.file_id):
            return StoreIOError(f"{self._disk.files.path(record.extent.file_id).parent}: the folder is not there")
        return CorruptRecordError("the block is not stored")

    def _read_block(self, key: BlockKey, found: Found) -> None:
        extent, record = found.record.extent, found.record
        if extent.nbytes > _MAX_EXTENT_NBYTES:
            raise CorruptRecordError(f"extent of {extent.nbytes} bytes: no block is that large")
        if self._arena is None or self._arena.nbytes < extent.nbytes:
            self._arena = Arena(extent.nbytes, False)
        file = self._disk.files.file(extent.file_id)
        self._pool.submit_read(file, self._arena, [(extent.offset, 0, extent.nbytes)]).wait()
        self._report.nbytes += extent.nbytes
        body = record_in(memoryview(self._arena)[: extent.nbytes], key, record)
        if record.is_object:
            check_body(body)
            return
        info = Codec.probe(body)
        if found.directory != bytes(body[: info.header_nbytes]):
            raise CorruptRecordError("the plane directory in the catalogue is not the one in the record")
        codec, slot = self._codec(info)
        codec.decode(body, slot, num_tokens=record.num_tokens)

    def _codec(self, info: RecordInfo) -> tuple[Codec, Tensor]:
        """A decoder and a slot for records of one geometry; plain `put` blocks have no stream that describes them."""
        dims = (info.num_layers, info.kv_heads, info.key_dim, info.value_dim, info.num_tokens)
        shape = (*dims, info.dtype, info.profile, info.calibration_id)
        if shape not in self._codecs:
            spec = ModelSpec(
                num_layers=info.num_layers,
                kv_heads=info.kv_heads,
                key_dim=info.key_dim,
                value_dim=info.value_dim,
                dtype=info.dtype,
                key_space="post",
                architecture="",
                rope="",
                revision="",
            )
            layout = BlockLayout(spec, info.num_tokens)
            # One scratch slot per geometry: block lengths vary within a stream, so the newest replaces the others.
            try:
                calibration = self._disk.calibrations.find(info.calibration_id)
            except CorruptRecordError as error:  # the record itself may be sound
                raise SpecMismatchError(str(error)) from error
            codec = Codec(layout, info.profile, calibration)
            self._codecs = {shape: (codec, torch.empty(layout.slot_nbytes, dtype=torch.uint8))}
        return self._codecs[shape]
