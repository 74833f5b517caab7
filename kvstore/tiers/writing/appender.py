# SPDX-License-Identifier: Apache-2.0
"""The producer's side of write-behind: checks what is appended, copies it to host slots, queues it in order."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from kvstore.config import Durability
from kvstore.errors import ConfigError, KVStoreError, ShapeError
from kvstore.layout import BlockLayout
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier, Lease
from kvstore.tiers.manifest import JSON, check_spec, dump_json
from kvstore.tiers.slots import check_blocks, copy_slot
from kvstore.tiers.tables.object_body import PackedObject
from kvstore.tiers.tables.records import Entry
from kvstore.tiers.tables.streams import find_state, find_stream
from kvstore.tiers.writing.jobs import AppendPiece, ObjectJob
from kvstore.tiers.writing.writer import Writer

_MAX_PIECE_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block to be appended.

    Args:
        entry: its place in the stream; `entry.index` continues the stream without a gap.
        slot: [slot_nbytes] uint8 CPU, contiguous; copied before `append` returns.
        summary: bytes for the index, stored beside the entry.
    """

    entry: Entry
    slot: Tensor
    summary: bytes


@dataclass(slots=True)
class _Progress:
    """How far a stream has been queued; out of date when a write failed since."""

    stream_id: int
    next_index: int
    failures: int


class _Part:
    """Blocks of one append that are handed to the writer together, again and again; owns their leases until then."""

    def __init__(self, writer: Writer, progress: _Progress) -> None:
        self._writer = writer
        self._progress = progress
        self._is_first = True
        self.blocks: list[NewBlock] = []
        self._leases: list[Lease] = []

    def add(self, block: NewBlock, lease: Lease) -> None:
        """Take a block, and over its lease."""
        self._leases.append(lease)
        self.blocks.append(block)

    def submit(self, cursor_json: bytes | None) -> None:
        """Hand over what was added since the last time."""
        blocks, leases = self.blocks, tuple(self._leases)
        self.blocks, self._leases = [], []
        entries, summaries = [block.entry for block in blocks], [block.summary for block in blocks]
        piece = AppendPiece(self._progress.stream_id, entries, summaries, leases, cursor_json, self._is_first)
        self._is_first = False
        try:
            self._writer.append(piece, self._progress.failures)
        except KVStoreError:  # it was not queued
            for lease in leases:
                lease.release()
            raise

    def drop(self) -> None:
        """Release what was not handed over."""
        for lease in self._leases:
            lease.release()


class Appender:
    """Feeds the writer. Thread-safe; appends from several threads follow each other.

    Args:
        disk: where the streams are.
        host: where blocks wait.
        writer: writes them.
        layout: layout of the slots.
    """

    def __init__(self, disk: DiskTier, host: HostTier, writer: Writer, layout: BlockLayout) -> None:
        self._disk = disk
        self._host = host
        self._writer = writer
        self._layout = layout
        self._lock = threading.Lock()
        self._streams: dict[str, _Progress] = {}
        self._unsure: set[str] = set()  # streams of interrupted appends

    def append(self, name: str, blocks: Sequence[NewBlock], cursor: Mapping[str, JSON]) -> None:
        """Queue blocks and the cursor that goes with them; see `Store.append`."""
        cursor_json = dump_json(dict(cursor), "cursor")
        with self._lock:
            progress = self._progress(name)
            self._check(name, blocks, progress.next_index)
            part = _Part(self._writer, progress)
            try:
                for block in blocks:
                    self._take(name, block, part)
                part.submit(cursor_json)
                progress.next_index += len(blocks)
            except BaseException:  # Ctrl-C too: it may stand in the queue whole, in part, or not at all
                part.drop()
                self._unsure.add(name)
                raise
        if self._disk.config.durability is Durability.SYNC:
            self._writer.flush()

    def put_objects(self, name: str, objects: Sequence[PackedObject], *, may_drop: bool) -> None:
        """Queue objects behind what was appended before; see `Store.put_objects`."""
        with self._lock:
            progress = self._progress(name)
            for each in objects:
                if each.num_blocks > progress.next_index:
                    raise ConfigError(
                        f"stream {name!r}: object {each.kind} {each.index} describes {each.num_blocks} blocks; "
                        f"the stream has {progress.next_index}"
                    )
            self._writer.put_objects(ObjectJob(progress.stream_id, objects, may_drop), progress.failures)
        if self._disk.config.durability is Durability.SYNC:
            self._writer.flush()

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """Let nobody append inside a `with` block, after which a stream may stand elsewhere."""
        with self._lock:
            try:
                yield
            finally:
                self._streams.pop(name, None)

    def _take(self, name: str, block: NewBlock, part: _Part) -> None:
        """Add a block to the part of the append that is being collected; waits while there is no slot for it."""
        if len(part.blocks) == _MAX_PIECE_BLOCKS:
            part.submit(None)
        lease = self._host.pin(block.entry.key)
        if lease is not None:
            part.add(block, lease)
            return
        lease = self._host.try_reserve(block.entry.key, name)
        if lease is None:
            # Hand over what has been collected: only the writer frees the slots that are waited for.
            part.submit(None)
            lease = self._host.reserve(block.entry.key, self._writer.check, name)
        part.add(block, lease)
        copy_slot(block.slot, lease.slot)
        lease.publish()

    def _progress(self, name: str) -> _Progress:
        if name in self._unsure:
            self._writer.flush()
            self._streams.pop(name, None)
            self._unsure.remove(name)
        failures = self._writer.check()
        known = self._streams.get(name)
        if known is not None and known.failures == failures:
            return known
        with self._disk.catalogue.read() as view:
            row = find_stream(view, name)
            state = find_state(view, row.stream_id)
        check_spec(row.header, self._layout.spec)
        self._streams[name] = _Progress(row.stream_id, state.num_entries, failures)
        return self._streams[name]

    def _check(self, name: str, blocks: Sequence[NewBlock], next_index: int) -> None:
        for index, block in enumerate(blocks, start=next_index):
            entry = block.entry
            if entry.index != index:
                raise ConfigError(f"stream {name!r}: entry {entry.index} appended, it continues at {index}")
            if entry.first_token < 0 or not -(1 << 63) <= entry.group < 1 << 63:
                raise ShapeError(f"entry {index}: first_token {entry.first_token}, group {entry.group} out of range")
            if not (math.isfinite(entry.start_s) and math.isfinite(entry.end_s)):
                raise ShapeError(f"entry {index}: its span, {entry.start_s} to {entry.end_s} s, must be finite")
        check_blocks(
            [block.entry.key for block in blocks],
            [block.slot for block in blocks],
            [block.entry.num_tokens for block in blocks],
            self._layout,
        )
