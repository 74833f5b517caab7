# SPDX-License-Identifier: Apache-2.0
"""Executes read plans: a few transfers in flight, each piece handed to a thread as soon as its bytes are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass

from kvstore.errors import KVStoreError, StoreIOError
from kvstore.native import IoPool, Ticket
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.reading.plan import MERGE_GAP_NBYTES, Piece, Run, merge
from kvstore.tiers.reading.staging import Region, Staging

_NUM_REGIONS = 4
_MIN_REGION_NBYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class _Flight:
    run: Run
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

    def read(
        self,
        pieces: Sequence[Piece],
        consume: Callable[[Piece, memoryview], None],
        fail: Callable[[Piece, KVStoreError], None],
    ) -> int:
        """Read all pieces; returns when each was consumed or failed.

        Args:
            pieces: none longer than `capacity_nbytes`.
            consume: called on another thread with a piece and its bytes, which are gone when it returns.
            fail: called on this thread with a piece that cannot be read; its neighbours are tried without it.

        Returns:
            Bytes read from the device.
        """
        runs = deque(merge(pieces, gap_nbytes=MERGE_GAP_NBYTES, max_nbytes=self.capacity_nbytes))
        flights: deque[_Flight] = deque()
        jobs: list[Future[None]] = []
        nbytes = 0
        try:
            while runs or flights:
                self._launch(runs, flights, fail)
                if not flights:
                    continue
                flight = flights.popleft()
                try:
                    flight.ticket.wait()
                except StoreIOError as error:
                    flight.region.release()
                    self._split(flight.run, runs, fail, error)
                    continue
                nbytes += flight.run.nbytes
                flight.region.retain(len(flight.run.pieces) - 1)
                submit = self._consumers.submit
                jobs.extend(submit(self._consume, flight, piece, consume) for piece in flight.run.pieces)
        finally:
            for flight in flights:
                with suppress(KVStoreError):  # an error of this thread is on its way up already
                    flight.ticket.wait()
                flight.region.release()
            wait(jobs)
        for job in jobs:
            job.result()
        return nbytes

    def close(self) -> None:
        """Give the staging memory back."""
        self._staging.close()

    def _launch(self, runs: deque[Run], flights: deque[_Flight], fail: Callable[[Piece, KVStoreError], None]) -> None:
        """Submit runs as long as there is memory; wait for memory only with nothing in flight."""
        while runs:
            region = self._staging.try_acquire() if flights else self._staging.acquire()
            if region is None:
                return
            run = runs.popleft()
            try:
                file = self._files.file(run.file_id)
                ticket = self._pool.submit_read(file, self._staging.arena, [(run.start, region.offset, run.nbytes)])
            except KVStoreError as error:
                region.release()
                for piece in run.pieces:
                    fail(piece, error)
                continue
            flights.append(_Flight(run, region, ticket))

    def _consume(self, flight: _Flight, piece: Piece, consume: Callable[[Piece, memoryview], None]) -> None:
        try:
            start = flight.region.offset + piece.start - flight.run.start
            consume(piece, self._staging.memory[start : start + piece.end - piece.start])
        finally:
            flight.region.release()

    def _split(
        self, run: Run, runs: deque[Run], fail: Callable[[Piece, KVStoreError], None], error: KVStoreError
    ) -> None:
        """After a failed transfer, try each of its pieces alone: one bad sector must not take its neighbours along."""
        if len(run.pieces) == 1:
            fail(run.pieces[0], error)
            return
        runs.extend(Run(piece.file_id, piece.start, piece.end, (piece,)) for piece in run.pieces)
