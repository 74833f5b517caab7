# SPDX-License-Identifier: Apache-2.0
"""Import: an exported stream into a store. Blocks first, plain and evictable; then the stream, in one transaction.

Killed before that transaction, an import leaves plain blocks; the next one finds them there and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kvstore.calibration import Calibration
from kvstore.decision import Decision
from kvstore.errors import (
    CapacityError,
    ConfigError,
    CorruptRecordError,
    KVStoreError,
    ReadOnlyError,
    StoreIOError,
    StreamNotFoundError,
    UnsupportedFormatError,
)
from kvstore.native import IoPool
from kvstore.record import probe
from kvstore.spec import BlockKey
from kvstore.tiers.base import Extent, Outcome
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.manifest import StreamHeader, load_json
from kvstore.tiers.tables.blocks import find_sound
from kvstore.tiers.tables.calibrations import find_decision, put_calibration, put_decision
from kvstore.tiers.tables.object_rows import ObjectRow
from kvstore.tiers.tables.records import ENTRY_NBYTES, Entry, StreamState, position_key, unpack_entry, unpack_state
from kvstore.tiers.tables.streams import find_state, find_stream, restore_stream
from kvstore.tiers.upkeep.container import Chunk, ContainerReader, Kind
from kvstore.tiers.upkeep.export_stream import BLOCK_PREFIX
from kvstore.tiers.upkeep.mend_streams import LOST_KEY
from kvstore.tiers.upkeep.object_chunks import read_objects, restore_objects
from kvstore.tiers.upkeep.record_check import RecordCheck
from kvstore.tiers.upkeep.transfer import EncodedBlock, RecordTransfer

_BATCH_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did.

    Args:
        header: of the stream.
        num_entries: entries of the manifest.
        num_blocks: distinct blocks in the file.
        is_new: False when the stream was there already: then only blocks that it lacked were brought back.
        missing: blocks that neither the file nor the store holds: the stream answers without them.
        num_objects: objects in the file.
    """

    header: StreamHeader
    num_entries: int
    num_blocks: int
    is_new: bool
    missing: list[BlockKey]
    num_objects: int


def import_stream(
    disk: DiskTier,
    pool: IoPool,
    path: Path,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Bring a stream from a file. A stream that is there already must be the same one; it gets back what it lacks.

    Whoever else writes in this process waits until it is done. Every record is decoded before it is stored. A block
    whose key the store holds is not written again: like every `put`, an import is believed that equal keys mean equal
    blocks.

    Args:
        disk: the store, open for writing.
        pool: moves the bytes.
        path: the file.
        name: what to call the stream; None keeps its name.
        progress: called with bytes of the file done and in all.

    Raises:
        CorruptRecordError: the file is cut off, damaged, or no exported stream; no stream was made.
        UnsupportedFormatError: a newer program wrote it.
        ConfigError: another stream of that name is there.
        CapacityError: there is no room; no stream was made.
        StoreIOError: the file cannot be read, or the store cannot be written.
        ReadOnlyError: the store is open for reading.
    """
    if not disk.is_writable:
        raise ReadOnlyError(f"{disk.folder}: open for reading; open it with Access.WRITE")
    try:
        with path.open("rb") as file:
            return _Import(disk, RecordTransfer(disk, pool), ContainerReader(file, str(path)), str(path), name).run(
                lambda done: progress(done, path.stat().st_size) if progress is not None else None
            )
    except KVStoreError:
        raise
    except OSError as error:
        raise StoreIOError(f"{path}: cannot be read: {error.strerror}") from error


class _Import:
    """One import on its way."""

    def __init__(
        self, disk: DiskTier, transfer: RecordTransfer, reader: ContainerReader, path: str, name: str | None
    ) -> None:
        self._disk = disk
        self._transfer = transfer
        self._reader = reader
        self._path = path
        self._tokens_of: dict[BlockKey, int] = {}
        self._objects: list[ObjectRow] = []
        self._batch: list[EncodedBlock] = []
        self._batch_nbytes = 0
        self._header = self._read_header(name)
        self._state = self._read_state()
        self._check = RecordCheck(disk.calibrations, self._header)

    def run(self, progress: Callable[[int], None]) -> ImportReport:
        """Read the file twice from the entries on: first everything is checked, then the stream is made."""
        with self._disk.changing():
            is_new = self._is_new()
            chunk = self._read_blocks(progress)
            first_offset, num_tokens = chunk.offset, 0
            for index in range(self._state.num_entries):
                num_tokens += self._parse_entry(chunk, index)[0].num_tokens
                chunk = self._reader.next()
            if chunk.kind is not Kind.END or num_tokens != self._state.num_tokens:
                raise CorruptRecordError(f"{self._path}: its entries are not those that its state announces")
            if self._reader.has_objects:
                self._read_objects(progress)
            missing = self._commit(first_offset, is_new)
        num_objects = len(self._objects)
        return ImportReport(self._header, self._state.num_entries, len(self._tokens_of), is_new, missing, num_objects)

    def _read_blocks(self, progress: Callable[[int], None]) -> Chunk:
        """Store calibrations and blocks; returns the first chunk behind them."""
        calibrations: list[Calibration] = []
        decision: Decision | None = None
        chunk = self._reader.next()
        while chunk.kind in (Kind.CALIBRATION, Kind.DECISION):
            if chunk.kind is Kind.CALIBRATION:
                calibrations.append(Calibration(chunk.payload))
            else:
                decision = Decision.from_json(chunk.payload)
            chunk = self._reader.next()
        self._put_calibrations(calibrations, decision)
        while chunk.kind is Kind.BLOCK:
            self._take_block(chunk.payload)
            progress(chunk.offset)
            chunk = self._reader.next()
        self._write_batch()
        return chunk

    def _read_header(self, name: str | None) -> StreamHeader:
        chunk = self._reader.next()
        if chunk.kind is not Kind.HEADER:
            raise CorruptRecordError(f"{self._path}: it does not begin with a header")
        found = str(load_json(chunk.payload, self._path).get("name"))
        header = StreamHeader.from_json(found, chunk.payload)
        return header if name is None else replace(header, name=name)

    def _read_state(self) -> StreamState:
        chunk = self._reader.next()
        if chunk.kind is not Kind.STATE:
            raise CorruptRecordError(f"{self._path}: the state of the stream is missing")
        state = unpack_state(chunk.payload)
        load_json(state.cursor_json, f"{self._path}: cursor")
        return state

    def _is_new(self) -> bool:
        with self._disk.catalogue.read() as view:
            try:
                present = find_stream(view, self._header.name)
            except StreamNotFoundError:
                return True
            state = find_state(view, present.stream_id)
        if state.num_entries == 0 and state.cursor_json == b"{}" and present.header.describes_same(self._header):
            return True
        if not present.header.describes_same(self._header) or state != self._state:
            raise self._another()
        return False

    def _another(self) -> ConfigError:
        return ConfigError(
            f"stream {self._header.name!r} is there and is another one; import under another name, or remove it"
        )

    def _put_calibrations(self, calibrations: list[Calibration], decision: Decision | None) -> None:
        spec = self._header.spec
        for calibration in calibrations:
            calibration.check_spec(spec)

        def put(view: WriteView) -> None:
            for calibration in calibrations:
                put_calibration(view, calibration)
            chosen = next((each for each in calibrations if decision and each.id == decision.calibration), None)
            if decision is not None and chosen is not None and find_decision(view, spec.fingerprint) is None:
                put_decision(view, spec.fingerprint, chosen, decision)

        if calibrations:
            self._disk.catalogue.write(put)

    def _take_block(self, payload: bytes) -> None:
        if len(payload) < BLOCK_PREFIX.size:
            raise CorruptRecordError(f"{self._path}: a block of {len(payload)} bytes")
        packed, num_tokens = BLOCK_PREFIX.unpack_from(payload)
        key, record = BlockKey(packed), payload[BLOCK_PREFIX.size :]
        info, spec = probe(record), self._header.spec
        found = (info.num_layers, info.kv_heads, info.key_dim, info.value_dim, info.dtype, info.num_tokens)
        if found != (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim, spec.dtype, num_tokens):
            raise CorruptRecordError(f"{self._path}: block {key.hex()[:16]} is not of the stream's model")
        if num_tokens > self._header.block_tokens:
            raise CorruptRecordError(f"{self._path}: block {key.hex()[:16]} has {num_tokens} tokens")
        try:
            self._disk.calibrations.find(info.calibration_id)
        except CorruptRecordError:
            return  # it was lost before the export: nobody can read the block, with or without its record
        if not self._check.is_sound(record, num_tokens):
            raise CorruptRecordError(f"{self._path}: block {key.hex()[:16]} cannot be decoded")
        self._tokens_of[key] = num_tokens
        self._add(EncodedBlock(key, num_tokens, record))

    def _read_objects(self, progress: Callable[[int], None]) -> None:
        for row, body in read_objects(self._reader, self._path, self._state.num_entries):
            self._objects.append(row)
            self._add(body)
            progress(self._reader.offset)
        self._write_batch()

    def _add(self, block: EncodedBlock) -> None:
        if self._batch and self._batch_nbytes + len(block.record) > _BATCH_NBYTES:
            self._write_batch()
        self._batch.append(block)
        self._batch_nbytes += len(block.record)

    def _keep(self) -> set[BlockKey]:
        return {*self._tokens_of, *(row.body for row in self._objects)}

    def _write_batch(self) -> None:
        outcomes = self._transfer.write(self._batch, self._keep())
        if Outcome.DAMAGED in outcomes:
            raise CorruptRecordError(f"{self._path}: a block is no record of the length that it says")
        if Outcome.FULL in outcomes:
            raise CapacityError(f"{self._disk.folder}: no room for the stream; remove others or raise the budget")
        self._batch, self._batch_nbytes = [], 0

    def _parse_entry(self, chunk: Chunk, index: int) -> tuple[Entry, bytes | None]:
        payload = chunk.payload
        if chunk.kind is not Kind.ENTRY or len(payload) <= ENTRY_NBYTES or payload[ENTRY_NBYTES] > 1:
            raise CorruptRecordError(f"{self._path}: entry {index} of {self._state.num_entries} is missing or damaged")
        entry = unpack_entry(index, payload[:ENTRY_NBYTES])
        if entry.num_tokens != self._tokens_of.get(entry.key, entry.num_tokens):
            raise CorruptRecordError(f"{self._path}: entry {index} and its block differ in tokens")
        return entry, payload[ENTRY_NBYTES + 1 :] if payload[ENTRY_NBYTES] else None

    def _entries(self, first_offset: int) -> Iterator[tuple[Entry, bytes | None]]:
        self._reader.rewind(first_offset)
        for index in range(self._state.num_entries):
            yield self._parse_entry(self._reader.next(), index)

    def _commit(self, first_offset: int, is_new: bool) -> list[BlockKey]:
        missing: list[BlockKey] = []

        def name(view: WriteView) -> list[Extent]:
            missing.clear()
            if is_new:
                missing.extend(restore_stream(view, self._header, self._state, self._entries(first_offset)))
            stream_id = find_stream(view, self._header.name).stream_id
            if not is_new:
                wanted: dict[BlockKey, None] = {}
                for entry, _ in self._entries(first_offset):
                    if _has_another(view, stream_id, entry):
                        raise self._another()
                    wanted[entry.key] = None
                missing.extend(key for key in wanted if find_sound(view, key) is None)
            restore_objects(view, stream_id, self._state.num_entries, self._objects)
            return []

        self._disk.commit(name, self._keep())
        return missing


def _has_another(view: ReadView, stream_id: int, entry: Entry) -> bool:
    """Whether a stream has another block in an entry's place; what is damaged there, or was, says nothing."""
    with suppress(CorruptRecordError, UnsupportedFormatError):
        packed = view.get(Table.ENTRIES, position_key(stream_id, entry.index))
        key = entry.key if packed is None else unpack_entry(entry.index, packed).key
        return key != entry.key and LOST_KEY not in (key, entry.key)
    return False
