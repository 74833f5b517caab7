# SPDX-License-Identifier: Apache-2.0
"""Executes read plans: many transfers in flight, pieces consumed in jobs as their bytes come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack, suppress
from itertools import chain

from kvstore.errors import KVStoreError, StoreIOError
from kvstore.native import Arena, DirectFile, IoPool
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.reading.landing import Landing, Pace, Placed, Wave
from kvstore.tiers.reading.plan import MERGE_GAP_NBYTES, Piece, Run, merge
from kvstore.tiers.reading.staging import Region, Staging

_NUM_REGIONS = 4
_MIN_REGION_NBYTES = 4 << 20
# Then a helper lets the next task of its thread pass.
_MOST_JOBS = 32

Consume = Callable[[Sequence[tuple[Piece, int]]], None]
Fail = Callable[[Piece, KVStoreError], None]


class ExtentReader:
    """Reads pieces of extent files into staging memory. Thread-safe; concurrent batches share the memory.

    Args:
        files: the extent files.
        pool: moves the bytes.
        helpers: threads that consume beside the one that reads; none of them ever waits for a device.
        most_helpers: how many of them one batch may take.
        largest_nbytes: longest piece that will be asked for.
    """

    def __init__(
        self, files: ExtentFiles, pool: IoPool, helpers: Executor, most_helpers: int, largest_nbytes: int
    ) -> None:
        self._files = files
        self._pool = pool
        self._helpers = helpers
        self._most_helpers = most_helpers
        self.pace = Pace()
        """To be told what decoding takes."""
        self._staging = Staging(_NUM_REGIONS, max(2 * largest_nbytes, _MIN_REGION_NBYTES))

    @property
    def capacity_nbytes(self) -> int:
        """Longest piece that can be read."""
        return self._staging.region_nbytes

    @property
    def memory(self) -> Arena:
        """Where bytes come to."""
        return self._staging.arena

    def read(self, parts: Iterable[Sequence[Piece]], consume: Consume, fail: Fail) -> int:
        """Read all pieces; returns when each was consumed or failed.

        Args:
            parts: pieces, none longer than `capacity_nbytes`; neighbours of one part are read together. A part is asked
                for when the one before is on its way.
            consume: called with pieces and where their bytes are in `memory`, until it returns; on this thread, and on
                helpers when bytes come faster than it consumes them.
            fail: called on this thread with a piece that cannot be read; its neighbours are tried without it.

        Returns:
            Bytes read from the device.
        """
        parts = iter(parts)
        begun = [next(parts, [])]
        if len(begun[0]) < 2:
            begun += parts
            if sum(map(len, begun)) == 1:
                return self._read_one(next(filter(None, begun))[0], consume, fail)
        parts = chain(begun, parts)
        landing = Landing(self.pace, self._most_helpers, self._staging.release)
        helping: list[Future[None]] = []
        try:
            self._read_runs(parts, landing, helping, consume, fail)
        finally:
            with ExitStack() as cleanup:  # each step whatever becomes of the others: a region kept is gone for ever
                cleanup.callback(landing.clear)
                cleanup.callback(wait, helping)
                cleanup.callback(lambda: [each.cancel() for each in helping])
                cleanup.callback(landing.stop)
        for each in helping:
            if not each.cancelled():
                each.result()
        return landing.nbytes

    def close(self) -> None:
        """Give the staging memory back."""
        self._staging.close()

    def _read_one(self, piece: Piece, consume: Consume, fail: Fail) -> int:
        """Read with no other thread than this one."""
        region = Region()
        try:
            try:
                self._staging.take(region)
                nbytes = piece.end - piece.start
                op = (piece.start, region.start, nbytes)
                try:
                    self._pool.read(self._file(piece.file_id), self._staging.arena, [op])
                except KVStoreError as error:
                    fail(piece, error)
                    return 0
                consume([(piece, region.start)])
                return nbytes
            finally:
                self._staging.release(region)
        finally:
            self._staging.release(region)  # for good: an interrupt may have kept the first call from it

    def _read_runs(
        self,
        parts: Iterable[Sequence[Piece]],
        landing: Landing,
        helping: list[Future[None]],
        consume: Consume,
        fail: Fail,
    ) -> None:
        runs: deque[Run] = deque()
        for part in parts:
            runs.extend(merge(part, gap_nbytes=MERGE_GAP_NBYTES, max_nbytes=self.capacity_nbytes))
            self._launch(runs, landing, fail, may_wait=True)
        while True:
            job = landing.take()
            self._launch(runs, landing, fail, may_wait=not job)
            if job:
                if landing.wants_help():
                    with suppress(RuntimeError):  # no thread can be had: this one does it all
                        helping.append(self._helpers.submit(self._help, landing, consume))
                self._consume(job, landing, consume)
                continue
            is_over = not landing.is_busy  # asked first: what was in flight then may have failed since
            for run, error in landing.take_failed():
                self._split(run, runs, fail, error)
            if is_over and not runs:
                return
            landing.wait()

    def _launch(self, runs: deque[Run], landing: Landing, fail: Fail, *, may_wait: bool) -> None:
        """Submit runs as long as there is memory; wait for it only with nothing in flight, and no piece in hand."""
        while runs:
            room_nbytes = landing.room_nbytes
            if room_nbytes == 0:
                return
            wave = Wave()
            landing.keep(wave)
            if not self._staging.take(wave.region, may_wait=may_wait and not landing.is_busy):
                landing.drop(wave)
                return
            ops: list[tuple[int, int, int]] = []
            at = begin = wave.region.start
            file_id = runs[0].file_id
            while runs and runs[0].file_id == file_id:
                nbytes = runs[0].nbytes
                is_full = at + nbytes > begin + self._staging.region_nbytes
                if is_full or (ops and room_nbytes is not None and at + nbytes > begin + room_nbytes):
                    break
                wave.runs.append(runs.popleft())
                wave.starts.append(at)
                ops.append((wave.runs[-1].start, at, nbytes))
                at += nbytes
            try:
                wave.ticket = self._pool.submit_read(self._file(file_id), self._staging.arena, ops)
            except KVStoreError as error:
                landing.drop(wave)
                for run in wave.runs:
                    for piece in run.pieces:
                        fail(piece, error)
                continue
            landing.add(wave)

    def _file(self, file_id: int) -> DirectFile:
        try:
            return self._files.file(file_id)
        except KVStoreError:
            raise
        except OSError as error:
            raise StoreIOError(error.errno, f"{self._files.path(file_id)}: {error.strerror}") from error

    def _help(self, landing: Landing, consume: Consume) -> None:
        """Consume what comes, until nothing is there."""
        try:
            for _ in range(_MOST_JOBS):
                job = landing.take(helps=True)
                if not job:
                    return
                self._consume(job, landing, consume, helps=True)
        finally:
            landing.end_help()

    def _consume(self, job: Sequence[Placed], landing: Landing, consume: Consume, *, helps: bool = False) -> None:
        try:
            consume([(placed.piece, placed.start) for placed in job])
        finally:
            landing.done(job, helps=helps)

    def _split(self, run: Run, runs: deque[Run], fail: Fail, error: KVStoreError) -> None:
        """After a failed transfer, try each of its pieces alone: one bad sector must not take its neighbours along."""
        if len(run.pieces) == 1:
            fail(run.pieces[0], error)
            return
        runs.extend(Run(piece.file_id, piece.start, piece.end, (piece,)) for piece in run.pieces)
