# SPDX-License-Identifier: Apache-2.0
"""Write-behind: a queue with bounded memory, one thread that groups what is queued into commits, and kept errors."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from kvstore.errors import BusyError, StoreIOError
from kvstore.telemetry.fault_log import log_fault
from kvstore.telemetry.tracing import span
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.writing.committer import Committer
from kvstore.tiers.writing.jobs import AppendPiece, ObjectJob, PutJob

# What one commit takes: as much as encoding, writing and committing gain from being done at once.
_MAX_BATCH_BLOCKS = 128
# Objects wait in memory of their own: who puts more than this waits until those before are written.
_MAX_OBJECT_NBYTES = 64 << 20

_Item: TypeAlias = AppendPiece | ObjectJob | PutJob


@dataclass(slots=True)
class _Queue:
    """What the threads share; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Item] = field(default_factory=deque)
    in_work: list[_Item] = field(default_factory=list)
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
        committer: writes what is taken from the queue.
    """

    def __init__(self, disk: DiskTier, host: HostTier, committer: Committer) -> None:
        self._disk = disk
        self._host = host
        self._committer = committer
        self._queue = _Queue()
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
            self._check_failures(failures)
            self._enqueue(piece)

    def put_objects(self, job: ObjectJob, failures: int) -> None:
        """Queue objects of a stream; waits while as many bytes of others wait as may.

        Args:
            job: what to write.
            failures: what `check` returned when the caller began.

        Raises:
            KVStoreError: like `check`; the job is not queued.
        """
        queue = self._queue
        with queue.changed:
            queue.changed.wait_for(lambda: queue.error is not None or self._has_room(job.nbytes))
            self._check_failures(failures)
            self._enqueue(job)

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

    def _has_room(self, nbytes: int) -> bool:
        waiting = [item.nbytes for item in (*self._queue.waiting, *self._queue.in_work) if isinstance(item, ObjectJob)]
        return not waiting or sum(waiting) + nbytes <= _MAX_OBJECT_NBYTES

    def _check_failures(self, failures: int) -> None:
        self._raise_pending()
        if self._queue.num_failures != failures:
            raise StoreIOError("an earlier write failed meanwhile; continue from the cursor in the manifest")

    def _raise_pending(self) -> None:
        error, self._queue.error = self._queue.error, None
        if error is not None:
            raise error
        self._check_open()

    def _check_open(self) -> None:
        if self._queue.is_closed:
            raise BusyError("the store is closed")

    def _enqueue(self, item: _Item) -> None:
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
        """Take all puts, all appended pieces, or all objects, at the head of the queue up to a limit, and commit."""
        queue = self._queue
        taken: list[_Item] = []
        num_blocks = 0
        with queue.changed:
            while queue.waiting and num_blocks < _MAX_BATCH_BLOCKS:
                if taken and type(queue.waiting[0]) is not type(taken[0]):
                    break
                taken.append(queue.waiting.popleft())
                num_blocks += taken[-1].num_blocks
            queue.in_work = list(taken)
        puts = [item for item in taken if isinstance(item, PutJob)]
        pieces = [item for item in taken if isinstance(item, AppendPiece)]
        objects = [item for item in taken if isinstance(item, ObjectJob)]
        with self._disk.mutation, span("kvstore.write", blocks=num_blocks):
            if pieces:
                self._committer.append(pieces)
            elif objects:
                self._committer.put_objects(objects)
            elif puts:
                self._committer.put(puts)

    def _settle(self, error: BaseException | None) -> None:
        """Give back what was in work, and drop all appends and objects after an error."""
        if error is not None:
            log_fault("append failed", store=str(self._disk.folder), reason=str(error))
        queue = self._queue
        with queue.changed:
            done = list(queue.in_work)
            queue.in_work.clear()
            if error is not None:
                done.extend(item for item in queue.waiting if not isinstance(item, PutJob))
                queue.waiting = deque(item for item in queue.waiting if isinstance(item, PutJob))
                self._committer.drop_open()
                queue.error = error
                queue.num_failures += 1
        for item in done:
            if isinstance(item, PutJob):
                continue  # ended by the committer, come what may
            for lease in item.leases:
                if error is not None:
                    self._host.forget(lease.key)
                lease.release()
        with queue.changed:
            queue.num_done += len(done)
            queue.changed.notify_all()
        self._host.wake()
