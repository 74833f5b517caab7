# SPDX-License-Identifier: Apache-2.0
"""What one batch has in flight and what of it has come: several threads take jobs from it, one waits for the device."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from kvstore.errors import KVStoreError
from kvstore.native import Ticket
from kvstore.tiers.reading.plan import Piece, Run
from kvstore.tiers.reading.staging import Region

_BACKLOG_S = 600e-6
"""Waking a thread, and taking turns with it in Python, costs a third of this; two threads of one core gain little."""

_JOB_S = 300e-6
_MAX_JOB_NBYTES = 4 << 20
"""A job costs some 40 us of Python, whatever is in it; slots stay claimed for as long as it takes."""

_FIRST_PACE_S = 2e-10
_PACE_WEIGHT = 0.2

_SLOW_BYTE_S = 7e-10
_FIRST_WINDOW_NBYTES = 512 << 10
_LAST_WINDOW_NBYTES = 4 << 20
"""Where decoding takes longer than reading, it only waits for the first bytes: few come first, then ever more."""


class Pace:
    """Seconds that a byte takes to decode, on average of late: of profile `raw` a tenth of what others take."""

    def __init__(self) -> None:
        self.byte_s = _FIRST_PACE_S

    def note(self, nbytes: int, span_s: float) -> None:
        """Count what one thread did; of two at once, one may be lost."""
        self.byte_s += _PACE_WEIGHT * (span_s / nbytes - self.byte_s)

    @property
    def first_window_nbytes(self) -> int | None:
        """Bytes to have in flight at first; None for all there are."""
        return _FIRST_WINDOW_NBYTES if self.byte_s > _SLOW_BYTE_S else None

    @property
    def job_nbytes(self) -> int:
        """Bytes that are worth a job."""
        return int(min(_JOB_S / self.byte_s, _MAX_JOB_NBYTES))


class Wave:
    """Runs of one file that are read by one submission, one behind the other in a region of memory.

    `region`, to be taken, goes back when every piece in it was consumed, or cannot be; `starts` says where each of
    `runs` begins in memory; `ticket` is that of the submission.
    """

    __slots__ = ("num_flying", "num_left", "num_out", "region", "runs", "starts", "ticket")

    def __init__(self) -> None:
        self.region = Region()
        self.runs: list[Run] = []
        self.starts: list[int] = []
        self.ticket: Ticket | None = None
        self.num_flying = 0  # runs
        self.num_left = 0  # pieces
        self.num_out = 0  # of these, pieces that helpers are consuming


class Placed(NamedTuple):
    """A piece whose bytes are in memory, from `start` on."""

    piece: Piece
    start: int
    wave: Wave


class Landing:
    """Waves of one batch, in flight or landed and not yet consumed. Thread-safe.

    Args:
        pace: how fast they are decoded.
        most_helpers: threads beside the one that waits for the device.
        release: called with a region when every piece in it was consumed, or cannot be; after an interrupt, again.
    """

    def __init__(self, pace: Pace, most_helpers: int, release: Callable[[Region], None]) -> None:
        self._lock = threading.Lock()
        self._pace = pace
        self._most_helpers = most_helpers
        self._release = release
        self._flying: deque[Wave] = deque()
        self._kept: list[Wave] = []
        self._ready: deque[Placed] = deque()
        self._ready_nbytes = 0
        self._num_helpers = 0
        self._failed: list[tuple[Run, KVStoreError]] = []
        self._window_nbytes = pace.first_window_nbytes
        self._flying_nbytes = 0
        self.nbytes = 0

    @property
    def is_busy(self) -> bool:
        """Whether bytes are on their way, or here and to be taken."""
        with self._lock:
            return bool(self._flying or self._ready)

    @property
    def room_nbytes(self) -> int | None:
        """Bytes that may be submitted now, or 0; None for as many as there are."""
        with self._lock:
            return None if self._window_nbytes is None else max(0, self._window_nbytes - self._flying_nbytes)

    def keep(self, wave: Wave) -> None:
        """See to it from now on that the region of a wave is given back, and not before its ticket has ended."""
        with self._lock:
            self._kept.append(wave)

    def drop(self, wave: Wave) -> None:
        """Give the region of a wave back, which has not been submitted."""
        with self._lock:
            self._leave(wave, wave.num_left)

    def add(self, wave: Wave) -> None:
        """Let a wave that was kept and submitted land."""
        with self._lock:
            wave.num_flying = len(wave.runs)
            wave.num_left = sum(len(run.pieces) for run in wave.runs)
            self._flying.append(wave)
            self._flying_nbytes += sum(run.nbytes for run in wave.runs)

    def wait(self) -> None:
        """Wait until something of the oldest wave has come; for the one thread that may."""
        with self._lock:
            if not self._flying:
                return
            wave = self._flying[0]
        assert wave.ticket is not None, "added when it was submitted"
        ended = wave.ticket.wait_some()
        with self._lock:
            self._land(wave, ended)

    def take(self, *, helps: bool = False) -> list[Placed]:
        """Return pieces that have come, as many as make a job; none when there are none.

        Args:
            helps: whether the caller is a helper, which may still consume when the batch has been given up.
        """
        with self._lock:
            if self._ready_nbytes < _MAX_JOB_NBYTES:
                for wave in tuple(self._flying):
                    assert wave.ticket is not None, "added when it was submitted"
                    self._land(wave, wave.ticket.wait_some(False))
            return self._cut(helps)

    def done(self, job: Sequence[Placed], *, helps: bool = False) -> None:
        """Give back the memory of a job that was consumed, however that went."""
        with self._lock:
            for wave, num_pieces in Counter(placed.wave for placed in job).items():
                wave.num_out -= num_pieces if helps else 0
                self._leave(wave, num_pieces)

    def wants_help(self) -> bool:
        """Whether so much waits to be consumed that another thread is worth waking; it is counted."""
        with self._lock:
            if self._ready_nbytes * self._pace.byte_s < _BACKLOG_S or self._num_helpers >= self._most_helpers:
                return False
            self._num_helpers += 1
            return True

    def end_help(self) -> None:
        """Count one helper less."""
        with self._lock:
            self._num_helpers -= 1

    def take_failed(self) -> list[tuple[Run, KVStoreError]]:
        """Return the transfers that failed since the last call."""
        with self._lock:
            failed, self._failed = self._failed, []
            return failed

    def stop(self) -> None:
        """Hand out nothing any more; transfers that have not begun are cancelled."""
        with self._lock:
            self._ready.clear()
            self._ready_nbytes = 0
            self._flying.clear()
            for wave in self._kept:
                if wave.ticket is not None:
                    wave.ticket.cancel()

    def clear(self) -> None:
        """After `stop`: wait until nothing is read into memory, and give it back; what a helper uses, when it is done.

        Called by the thread that reads, which has no job in hand any more.
        """
        for wave in tuple(self._kept):
            try:
                if wave.ticket is not None:
                    with suppress(KVStoreError):  # an error of the batch is on its way up already
                        wave.ticket.wait()
            finally:
                with self._lock:
                    self._leave(wave, wave.num_left - wave.num_out)

    def _land(self, wave: Wave, ended: list[int]) -> None:
        if not ended:
            return
        assert wave.ticket is not None, "added when it was submitted"
        errors = wave.ticket.errors()
        wave.num_flying -= len(ended)
        if wave.num_flying == 0 and wave in self._flying:
            self._flying.remove(wave)
            if self._window_nbytes is not None:
                is_last = 2 * self._window_nbytes >= _LAST_WINDOW_NBYTES
                self._window_nbytes = None if is_last else 2 * self._window_nbytes
        for number in ended:
            run = wave.runs[number]
            nbytes = run.nbytes
            self._flying_nbytes -= nbytes
            if number in errors:
                self._failed.append((run, errors[number]))
                self._leave(wave, len(run.pieces))
                continue
            self.nbytes += nbytes
            base = wave.starts[number] - run.start
            for piece in run.pieces:
                self._ready.append(Placed(piece, base + piece.start, wave))
                self._ready_nbytes += piece.end - piece.start

    def _cut(self, helps: bool) -> list[Placed]:
        job: list[Placed] = []
        job_nbytes = self._pace.job_nbytes
        nbytes = 0
        while self._ready and (nbytes < job_nbytes or not job):
            placed = self._ready.popleft()
            job.append(placed)
            nbytes += placed.piece.end - placed.piece.start
            placed.wave.num_out += helps
        self._ready_nbytes -= nbytes
        return job

    def _leave(self, wave: Wave, num_pieces: int) -> None:
        wave.num_left -= num_pieces
        if wave.num_left == 0 and wave in self._kept:
            self._release(wave.region)
            self._kept.remove(wave)  # last: an interrupt before it has `clear` release once more
