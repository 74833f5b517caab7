# SPDX-License-Identifier: Apache-2.0
"""Executes read plans: many transfers in flight, pieces handed to threads as soon as their bytes are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from kvstore.errors import KVStoreError, StoreIOError
from kvstore.native import DirectFile, IoPool, Ticket
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.reading.plan import MERGE_GAP_NBYTES, Piece, Run, merge
from kvstore.tiers.reading.staging import Region, Staging

_NUM_REGIONS = 4
_MIN_REGION_NBYTES = 4 << 20
# A job costs some 20 us of Python: so much is decoded by one, unless the batch is too small to keep threads busy.
_JOB_NBYTES = 512 << 10
_JOBS_PER_BATCH = 8

Consume = Callable[[Piece, memoryview], None]
Fail = Callable[[Piece, KVStoreError], None]


@dataclass(frozen=True, slots=True)
class _Wave:
    """Runs of one file that are read by one submission, one behind the other in a region."""

    runs: list[Run]
    starts: list[int]
    region: Region
    ticket: Ticket


class ExtentReader:
    """Reads pieces of extent files into staging memory. Thread-safe; concurrent batches share the memory.

    Args:
        files: the extent files.
        pool: moves the bytes.
        consumers: threads that run `consume`.
        largest_nbytes: longest piece that will be asked for.
    """

    def __init__(self, files: ExtentFiles, pool: IoPool, consumers: Executor, largest_nbytes: int) -> None:
        self._files = files
        self._pool = pool
        self._consumers = consumers
        self._staging = Staging(_NUM_REGIONS, max(2 * largest_nbytes, _MIN_REGION_NBYTES))

    @property
    def capacity_nbytes(self) -> int:
        """Longest piece that can be read."""
        return self._staging.region_nbytes

    def read(self, pieces: Sequence[Piece], consume: Consume, fail: Fail) -> int:
        """Read all pieces; returns when each was consumed or failed.

        Args:
            pieces: none longer than `capacity_nbytes`.
            consume: called with a piece and its bytes, which are gone when it returns; on other threads, unless there
                is one piece only.
            fail: called on this thread with a piece that cannot be read; its neighbours are tried without it.

        Returns:
            Bytes read from the device.
        """
        if len(pieces) == 1:
            return self._read_one(pieces[0], consume, fail)
        runs = deque(merge(pieces, gap_nbytes=MERGE_GAP_NBYTES, max_nbytes=self.capacity_nbytes))
        job_nbytes = min(sum(run.end - run.start for run in runs) // _JOBS_PER_BATCH, _JOB_NBYTES)
        waves: deque[_Wave] = deque()
        jobs: list[Future[None]] = []
        nbytes = 0
        try:
            while runs or waves:
                self._launch(runs, waves, fail)
                if waves:
                    nbytes += self._land(waves[0], runs, jobs, job_nbytes, consume, fail)
                    waves.popleft().region.release()
        finally:
            with ExitStack() as cleanup:  # each step whatever becomes of the others: a region kept is gone for ever
                cleanup.callback(wait, jobs)
                for wave in waves:
                    cleanup.callback(_abandon, wave)
        for job in jobs:
            job.result()
        return nbytes

    def close(self) -> None:
        """Give the staging memory back."""
        self._staging.close()

    def _read_one(self, piece: Piece, consume: Consume, fail: Fail) -> int:
        """Read and consume on this thread: handing one piece over would take longer than it saves."""
        region = self._staging.acquire()
        try:
            nbytes = piece.end - piece.start
            try:
                self._pool.read(self._file(piece.file_id), self._staging.arena, [(piece.start, region.offset, nbytes)])
            except KVStoreError as error:
                fail(piece, error)
                return 0
            consume(piece, self._staging.memory[region.offset : region.offset + nbytes])
            return nbytes
        finally:
            region.release()

    def _launch(self, runs: deque[Run], waves: deque[_Wave], fail: Fail) -> None:
        """Submit runs as long as there is memory; wait for memory only with nothing in flight."""
        while runs:
            region = self._staging.try_acquire() if waves else self._staging.acquire()
            if region is None:
                return
            taken: list[Run] = []
            starts: list[int] = []
            at, end = region.offset, region.offset + self._staging.region_nbytes
            file_id = runs[0].file_id
            with ExitStack() as unless_launched:
                unless_launched.callback(region.release)
                while runs and runs[0].file_id == file_id and at + runs[0].nbytes <= end:
                    taken.append(runs.popleft())
                    starts.append(at)
                    at += taken[-1].nbytes
                ops = [(run.start, start, run.nbytes) for run, start in zip(taken, starts, strict=True)]
                try:
                    ticket = self._pool.submit_read(self._file(file_id), self._staging.arena, ops)
                except KVStoreError as error:
                    for run in taken:
                        for piece in run.pieces:
                            fail(piece, error)
                    continue
                waves.append(_Wave(taken, starts, region, ticket))
                unless_launched.pop_all()

    def _file(self, file_id: int) -> DirectFile:
        try:
            return self._files.file(file_id)
        except KVStoreError:
            raise
        except OSError as error:
            raise StoreIOError(error.errno, f"{self._files.path(file_id)}: {error.strerror}") from error

    def _land(
        self, wave: _Wave, runs: deque[Run], jobs: list[Future[None]], job_nbytes: int, consume: Consume, fail: Fail
    ) -> int:
        """Hand over the pieces of a wave as its runs end; what failed joins `runs` again, piece by piece."""
        nbytes = gathered = 0
        ready: list[tuple[Piece, int]] = []
        num_left = len(wave.runs)
        while num_left:
            ended = wave.ticket.wait_some()
            errors = wave.ticket.errors()
            num_left -= len(ended)
            for number in ended:
                run = wave.runs[number]
                if number in errors:
                    self._split(run, runs, fail, errors[number])
                    continue
                nbytes += run.nbytes
                gathered += run.nbytes
                base = wave.starts[number] - run.start
                ready += [(piece, base + piece.start) for piece in run.pieces]
            if ready and (gathered >= job_nbytes or not num_left):
                wave.region.retain()
                try:
                    jobs.append(self._consumers.submit(self._consume, wave.region, ready, consume))
                except BaseException:
                    wave.region.release()
                    raise
                ready, gathered = [], 0
        return nbytes

    def _consume(self, region: Region, ready: list[tuple[Piece, int]], consume: Consume) -> None:
        memory = self._staging.memory
        try:
            for piece, start in ready:
                consume(piece, memory[start : start + piece.end - piece.start])
        finally:
            region.release()

    def _split(self, run: Run, runs: deque[Run], fail: Fail, error: KVStoreError) -> None:
        """After a failed transfer, try each of its pieces alone: one bad sector must not take its neighbours along."""
        if len(run.pieces) == 1:
            fail(run.pieces[0], error)
            return
        runs.extend(Run(piece.file_id, piece.start, piece.end, (piece,)) for piece in run.pieces)


def _abandon(wave: _Wave) -> None:
    """Let go of a wave whose bytes nobody wants any more, once nothing is read into its region."""
    try:
        wave.ticket.cancel()
        with suppress(KVStoreError):  # another error is on its way up already
            wave.ticket.wait()
    finally:
        wave.region.release()
