# SPDX-License-Identifier: Apache-2.0
"""Write-behind: a queue with bounded memory, one thread that groups what is queued into commits, errors kept for later.

A batch is: write the records of new blocks, sync them, then one catalogue transaction that names the blocks and
appends to the manifests.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kvstore.errors import BusyError, CapacityError, KVStoreError, StoreIOError
from kvstore.spec import BlockKey
from kvstore.telemetry.fault_log import log_fault
from kvstore.telemetry.tracing import span
from kvstore.tiers.base import Extent, Outcome
from kvstore.tiers.catalogue import WriteView
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.tables.blocks import find_sound, insert_block
from kvstore.tiers.tables.streams import append_entries
from kvstore.tiers.writing.calibrator import Calibrator
from kvstore.tiers.writing.jobs import AppendPiece, GrowingAppend, PutJob
from kvstore.tiers.writing.record_writer import NewRecord, RecordWriter, WrittenRecord

_MAX_BATCH_BLOCKS = 64


@dataclass(slots=True)
class _Queue:
    """What the threads share; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[AppendPiece | PutJob] = field(default_factory=deque)
    in_work: list[AppendPiece | PutJob] = field(default_factory=list)
    error: BaseException | None = None
    num_failures: int = 0
    num_queued: int = 0
    num_done: int = 0
    is_closed: bool = False


class Writer:
    """Owns the write-behind thread. Thread-safe.

    After an error everything that was queued is dropped: the next call raises the error once, and producers go on from
    the cursor in their manifest.

    Args:
        disk: where blocks go.
        host: where the queued blocks lie.
        records: encodes and writes.
        calibrator: measures what was written.
        damaged: blocks on disk that failed a check: written again when they come along.
    """

    def __init__(
        self,
        disk: DiskTier,
        host: HostTier,
        records: RecordWriter,
        calibrator: Calibrator,
        damaged: set[BlockKey],
    ) -> None:
        self._disk = disk
        self._host = host
        self._records = records
        self._calibrator = calibrator
        self._damaged = damaged
        self._queue = _Queue()
        self._open: dict[int, GrowingAppend] = {}
        # One worker: batches are committed in the order of the queue.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-writer")

    @property
    def num_queued(self) -> int:
        """Blocks that wait or are being written."""
        with self._queue.changed:
            return sum(item.num_blocks for item in (*self._queue.waiting, *self._queue.in_work))

    def check(self) -> int:
        """Raise what an earlier batch hit, once.

        Returns:
            How many batches failed so far: after a change, what a caller knows about durable entries is out of date.

        Raises:
            CapacityError, StoreIOError, KVStoreError: what stopped the batch.
            BusyError: the store is closed.
        """
        with self._queue.changed:
            self._raise_pending()
            return self._queue.num_failures

    def append(self, piece: AppendPiece, failures: int) -> None:
        """Queue a part of an append.

        Args:
            piece: what to write.
            failures: what `check` returned when the caller began.

        Raises:
            KVStoreError: like `check`; the piece is not queued.
        """
        with self._queue.changed:
            self._raise_pending()
            if self._queue.num_failures != failures:
                raise StoreIOError("an earlier write failed meanwhile; continue from the cursor in the manifest")
            self._enqueue(piece)

    def put(self, job: PutJob) -> None:
        """Queue a `put`; its ticket tells what becomes of it. Errors of appends are none of its business.

        Raises:
            BusyError: the store is closed.
        """
        with self._queue.changed:
            self._check_open()
            self._enqueue(job)

    def flush(self) -> None:
        """Wait until everything queued so far is committed or has failed; raises like `check`."""
        queue = self._queue
        with queue.changed:
            # What others queue meanwhile is not waited for: a busy producer must not keep this caller here.
            target = queue.num_queued
            queue.changed.wait_for(lambda: queue.num_done >= target)
            self._raise_pending()

    def close(self) -> None:
        """Write what is queued, end the thread, raise what it hit."""
        try:
            self.flush()
        finally:
            with self._queue.changed:
                self._queue.is_closed = True
            self._thread.shutdown()
            self._host.wake()

    def _raise_pending(self) -> None:
        error, self._queue.error = self._queue.error, None
        if error is not None:
            raise error
        self._check_open()

    def _check_open(self) -> None:
        if self._queue.is_closed:
            raise BusyError("the store is closed")

    def _enqueue(self, item: AppendPiece | PutJob) -> None:
        self._thread.submit(self._run)  # first, and it waits for our lock: Ctrl-C leaves nothing queued without a job
        self._queue.num_queued += 1
        self._queue.waiting.append(item)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._work()
        except BaseException as caught:  # noqa: BLE001 - kept for the producers, whatever it is
            error = caught
        self._settle(error)

    def _work(self) -> None:
        """Take one put, or all appended pieces at the head of the queue up to a limit, and commit."""
        queue = self._queue
        pieces: list[AppendPiece] = []
        put: PutJob | None = None
        with queue.changed:
            while queue.waiting and sum(piece.num_blocks for piece in pieces) < _MAX_BATCH_BLOCKS:
                head = queue.waiting[0]
                if isinstance(head, PutJob):
                    put = None if pieces else head
                    break
                pieces.append(head)
                queue.waiting.popleft()
            if put is not None:
                queue.waiting.popleft()
            queue.in_work = [put] if put is not None else list(pieces)
        num_blocks = sum(item.num_blocks for item in queue.in_work)
        with self._disk.mutation, span("kvstore.write", blocks=num_blocks):
            if pieces:
                self._commit_pieces(pieces)
            elif put is not None:
                self._commit_put(put)

    def _settle(self, error: BaseException | None) -> None:
        """Give back what was in work, and drop all appends after an error."""
        if error is not None:
            log_fault("append failed", store=str(self._disk.folder), reason=str(error))
        queue = self._queue
        with queue.changed:
            done = list(queue.in_work)
            queue.in_work.clear()
            if error is not None:
                done.extend(item for item in queue.waiting if isinstance(item, AppendPiece))
                queue.waiting = deque(item for item in queue.waiting if isinstance(item, PutJob))
                self._open.clear()
                queue.error = error
                queue.num_failures += 1
        for item in done:
            if isinstance(item, PutJob):
                continue  # ended by `_commit_put`, come what may
            for lease in item.leases:
                if error is not None:
                    self._host.forget(lease.key)
                lease.release()
        with queue.changed:
            queue.num_done += len(done)
            queue.changed.notify_all()
        self._host.wake()

    def _commit_pieces(self, pieces: Sequence[AppendPiece]) -> None:
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
        written, full = self._records.write(unstored, keep)
        if full is not None:
            self._records.discard(written)
            raise full
        self._name(written, complete, keep)
        self._calibrator.measure(unstored)

    def _commit_put(self, put: PutJob) -> None:
        numbers = put.begin()
        outcomes = [Outcome.UNAVAILABLE] * len(numbers)
        try:
            outcomes = self._store_put([_record_of(put, number) for number in numbers])
        except KVStoreError as error:
            log_fault("blocks not stored", store=str(self._disk.folder), blocks=len(numbers), reason=str(error))
        finally:
            put.end(numbers, outcomes)
        self._disk.note_use(
            put.keys[number] for number, outcome in zip(numbers, outcomes, strict=True) if outcome is Outcome.STORED
        )

    def _store_put(self, new: Sequence[NewRecord]) -> list[Outcome]:
        unstored = self._unstored(new)
        keep = {entry.key for growing in self._open.values() for entry in growing.entries}
        keep.update(each.key for each in new)
        try:
            written, _ = self._records.write(unstored, keep)
            self._name(written, (), keep)
        except CapacityError:
            written = []
        self._calibrator.measure(unstored[: len(written)])
        refused = {each.key for each in unstored} - {each.key for each in written}
        return [Outcome.FULL if each.key in refused else Outcome.STORED for each in new]

    def _unstored(self, blocks: Sequence[NewRecord]) -> list[NewRecord]:
        """Drop repetitions and what is on disk in good order."""
        distinct = {block.key: block for block in blocks}
        with self._disk.catalogue.read() as view:
            return [block for key, block in distinct.items() if key in self._damaged or find_sound(view, key) is None]

    def _name(
        self, written: Sequence[WrittenRecord], appends: Sequence[GrowingAppend], keep: Collection[BlockKey]
    ) -> None:
        """The one transaction of a batch; extents are kept only if it commits."""

        def name(view: WriteView) -> list[Extent]:
            replaced = [insert_block(view, new.key, new.record, new.directory) for new in written]
            for each in appends:
                append_entries(view, each.stream_id, each.entries, each.summaries, each.cursor_json)
            return [extent for extent in replaced if extent is not None]

        is_committed = False
        try:
            self._disk.commit(name, keep)
            is_committed = True
        finally:
            if not is_committed:
                self._records.discard(written)
        self._damaged.difference_update(each.key for each in written)


def _record_of(put: PutJob, number: int) -> NewRecord:
    return NewRecord(put.keys[number], put.slots[number], put.num_tokens[number], 0)
