# SPDX-License-Identifier: Apache-2.0
"""One batch: write the records of new blocks, and one catalogue transaction that names them when they are on disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress

from kvstore.errors import CapacityError, KVStoreError
from kvstore.spec import BlockKey
from kvstore.telemetry.fault_log import log_fault
from kvstore.tiers.base import Extent, Outcome
from kvstore.tiers.catalogue import WriteView
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.tables.blocks import PlacedBlock, find_stored, insert_blocks
from kvstore.tiers.tables.streams import append_entries
from kvstore.tiers.writing.calibrator import Calibrator
from kvstore.tiers.writing.jobs import AppendPiece, GrowingAppend, ObjectJob, PutJob
from kvstore.tiers.writing.object_writer import ObjectWriter
from kvstore.tiers.writing.packing import NewRecord
from kvstore.tiers.writing.record_writer import RecordWriter


class Committer:
    """Commits batches; used by the writer's thread, under `DiskTier.mutation`.

    Args:
        disk: where blocks go.
        records: encodes and writes.
        calibrator: measures what was written.
        damaged: blocks on disk that failed a check: written again when they come along.
        objects: writes and commits objects of streams.
    """

    def __init__(
        self,
        disk: DiskTier,
        records: RecordWriter,
        calibrator: Calibrator,
        damaged: set[BlockKey],
        objects: ObjectWriter,
    ) -> None:
        self._disk = disk
        self._objects = objects
        self._records = records
        self._calibrator = calibrator
        self._damaged = damaged
        self._open: dict[int, GrowingAppend] = {}

    def drop_open(self) -> None:
        """Forget parts of appends that wait for their last one: it will not come."""
        self._open.clear()

    def append(self, pieces: Sequence[AppendPiece]) -> None:
        """Store parts of appends; those that are whole with them become visible.

        Raises:
            CapacityError, StoreIOError: nothing of it is stored.
        """
        new = [
            NewRecord(entry.key, lease.slot, entry.num_tokens, entry.first_token)
            for piece in pieces
            for entry, lease in zip(piece.entries, piece.leases, strict=True)
        ]
        complete: list[GrowingAppend] = []
        for piece in pieces:
            if piece.is_first or piece.stream_id not in self._open:  # what is open was interrupted
                self._open[piece.stream_id] = GrowingAppend(piece.stream_id)
            self._open[piece.stream_id].add(piece)
            if piece.cursor_json is not None:
                complete.append(self._open.pop(piece.stream_id))
        keep = {entry.key for growing in (*complete, *self._open.values()) for entry in growing.entries}
        unstored = self._unstored(new)
        placed, full = self._records.write(unstored, keep)
        if full is not None:
            self._records.discard(placed)
            raise full
        self._name(placed, complete, keep)
        self._calibrator.measure(unstored)

    def put_objects(self, jobs: Sequence[ObjectJob]) -> None:
        """Store objects of streams, all or none of those that must be; raises like `ObjectWriter.store`."""
        keep = {entry.key for growing in self._open.values() for entry in growing.entries}
        try:
            self._objects.store(jobs, keep)
        except CapacityError as error:
            needed = [job for job in jobs if not job.may_drop]
            if len(needed) == len(jobs):
                raise
            log_fault("objects left out", store=str(self._disk.folder), reason=str(error))
            self._objects.store(needed, keep)

    def put(self, puts: Sequence[PutJob]) -> None:
        """Store puts together; where the device fails or not all fit, one by one, so that each ends as if alone."""
        begun = [(put, put.begin()) for put in puts]
        try:
            if len(begun) > 1:
                with suppress(KVStoreError):  # whoever is tried alone says why
                    outcomes = self._store([block for each in begun for block in _records_of(*each)])
                    if Outcome.FULL not in outcomes:
                        while begun:
                            put, numbers = begun.pop()
                            put.end(numbers, [outcomes.pop() for _ in numbers][::-1])
            while begun:
                put, numbers = begun[0]
                outcomes = [Outcome.UNAVAILABLE] * len(numbers)
                try:
                    outcomes = self._store(_records_of(put, numbers))
                except KVStoreError as error:
                    log_fault("blocks not stored", store=str(self._disk.folder), blocks=len(numbers), reason=str(error))
                del begun[0]
                put.end(numbers, outcomes)
        finally:
            for put, numbers in begun:
                put.end(numbers, [Outcome.UNAVAILABLE] * len(numbers))

    def _store(self, new: Sequence[NewRecord]) -> list[Outcome]:
        unstored = self._unstored(new)
        keep = {entry.key for growing in self._open.values() for entry in growing.entries}
        keep.update(each.key for each in new)
        try:
            placed, _ = self._records.write(unstored, keep)
            self._name(placed, (), keep)
        except CapacityError:
            placed = []
        fresh = {each.key for each in placed}
        refused = {each.key for each in unstored} - fresh
        self._calibrator.measure([each for each in unstored if each.key in fresh])
        self._disk.note_use(each.key for each in new if each.key not in refused and each.key not in fresh)
        return [Outcome.FULL if each.key in refused else Outcome.STORED for each in new]

    def _unstored(self, blocks: Sequence[NewRecord]) -> list[NewRecord]:
        """Drop repetitions and what is on disk in good order."""
        distinct = {block.key: block for block in blocks}
        with self._disk.catalogue.read() as view:
            stored = find_stored(view, distinct) - self._damaged
        return [block for key, block in distinct.items() if key not in stored]

    def _name(
        self, placed: Sequence[PlacedBlock], appends: Sequence[GrowingAppend], keep: Collection[BlockKey]
    ) -> None:
        """The one transaction of a batch, made up while its records are written; these are kept only if it commits."""

        def name(view: WriteView) -> list[Extent]:
            freed = insert_blocks(view, placed)
            for each in appends:
                append_entries(view, each.stream_id, each.entries, each.summaries, each.cursor_json)
            return freed

        is_committed = False
        try:
            self._disk.commit(name, keep, self._records.finish)
            is_committed = True
        finally:
            if not is_committed:
                self._records.discard(placed)
        self._damaged.difference_update(each.key for each in placed)


def _records_of(put: PutJob, numbers: Sequence[int]) -> list[NewRecord]:
    return [NewRecord(put.keys[number], put.slots[number], put.num_tokens[number], 0) for number in numbers]
