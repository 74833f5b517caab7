# SPDX-License-Identifier: Apache-2.0
"""Threads that talk to a server, each with memory and a link of its own; callers leave a thread behind that hangs.

A library may hang for longer than a caller can wait, and write to its buffers when it wakes up. So bytes travel through
memory that belongs to the thread, and nobody waits for a thread: tickets and futures end by the clock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from kvstore.errors import KVStoreError, StoreIOError
from kvstore.remote.breaker import Breaker, BreakerState
from kvstore.remote.transport import Link, Span, Transport

_LOG = logging.getLogger(__name__)
_MAX_WAITING = 1024
_MAX_LEFT_BEHIND = 8
_SCRATCH_NBYTES = (1 << 20) + 4096
_MIN_MEMORY_NBYTES = 4 << 20

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class LaneConfig:
    """How many threads, and how patient they are.

    Args:
        count: threads that work at once.
        deadline_s: seconds that one exchange with the server may take.
        patience_s: seconds after which an exchange that has not ended counts as a failure.
    """

    count: int = 2
    deadline_s: float = 2.0
    patience_s: float = 0.5


class Lane:
    """What one thread works with. Used by that thread only, but for `overdue_s`."""

    def __init__(self, transport: Transport, breaker: Breaker, config: LaneConfig) -> None:
        self._transport = transport
        self._breaker = breaker
        self._config = config
        self._link: Link | None = None
        self._buffer = transport.allocate(_MIN_MEMORY_NBYTES)
        self._began_s: float | None = None
        self._counting = threading.Lock()
        self._is_counted = False
        self.memory = memoryview(self._buffer)
        self.is_retired = False

    def rooms(self, count: int, nbytes: int) -> list[Span]:
        """Divide the memory behind the scratch room into rooms; what lay there before is lost."""
        needed_nbytes = _SCRATCH_NBYTES + count * nbytes
        if needed_nbytes > len(self.memory):
            self.hang_up()
            self.memory.release()
            self._transport.free(self._buffer)
            self._buffer = self._transport.allocate(needed_nbytes)
            self.memory = memoryview(self._buffer)
        return [Span(_SCRATCH_NBYTES + number * nbytes, nbytes) for number in range(count)]

    def scratch(self, nbytes: int) -> Span:
        """A room beside those of `rooms`, of a MiB and an envelope at most."""
        assert nbytes <= _SCRATCH_NBYTES, "parts of objects are small"
        return Span(0, nbytes)

    def part(self, span: Span) -> memoryview:
        """The bytes of a room."""
        return self.memory[span.offset : span.offset + span.nbytes]

    def ask(self, action: Callable[[Link, float], Result], deadline_s: float | None = None) -> Result:
        """Talk to the server: `action` gets the link, and the time when it is to give up.

        Args:
            action: one exchange.
            deadline_s: seconds it may take, instead of the usual ones.

        Raises:
            StoreIOError: it failed, or the breaker is open.
        """
        if not self._breaker.admit():
            raise StoreIOError(f"{self._transport.place}: left alone for a while, since it kept failing")
        self._is_counted = False
        self._began_s = time.monotonic()
        until_s = self._began_s + (self._config.deadline_s if deadline_s is None else deadline_s)
        try:
            if self._link is None:
                self._link = self._transport.connect(self._buffer, until_s)
            result = action(self._link, until_s)
        except BaseException as error:
            self._began_s = None
            self.hang_up()
            self._count_failure(error)
            raise
        self._began_s = None
        self._breaker.succeeded()
        return result

    def overdue_s(self) -> float:
        """Seconds that the exchange under way has lasted beyond patience; negative when none has. Counts the first."""
        began_s = self._began_s
        late_s = -1.0 if began_s is None else time.monotonic() - began_s - self._config.patience_s
        if late_s >= 0:
            self._count_failure(StoreIOError(f"no answer for {self._config.patience_s + late_s:.1f} s"))
        return late_s

    def hang_up(self) -> None:
        """Drop the link; the next exchange opens another."""
        link, self._link = self._link, None
        if link is not None:
            with suppress(KVStoreError, OSError):
                link.close()

    def close(self) -> None:
        """Hang up and free the memory: nobody else writes to it any more."""
        self.hang_up()
        self.memory.release()
        self._transport.free(self._buffer)

    def _count_failure(self, error: BaseException) -> None:
        with self._counting:
            if self._is_counted:
                return
            self._is_counted = True
        before = self._breaker.num_opened
        self._breaker.failed()
        if self._breaker.num_opened > before:
            _LOG.warning("remote tier: %s is left alone for a while: %s", self._transport.place, error)


@dataclass(frozen=True, slots=True)
class _Task:
    run: Callable[[Lane], None]
    give_up: Callable[[], None]


class Lanes:
    """The threads of one server. Thread-safe; threads start as they are needed.

    Args:
        transport: makes links; closed with the lanes.
        breaker: says whether to try at all.
        config: how many threads, how patient.
    """

    def __init__(self, transport: Transport, breaker: Breaker, config: LaneConfig) -> None:
        self._transport = transport
        self._breaker = breaker
        self._config = config
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lanes: dict[Lane, threading.Thread] = {}
        self._is_closed = False

    @property
    def num_left_behind(self) -> int:
        """Threads that hang in a call that nobody waits for any more."""
        with self._lock:
            return sum(lane.is_retired for lane in self._lanes)

    def submit(self, run: Callable[[Lane], None], give_up: Callable[[], None]) -> None:
        """Have a thread run something; returns at once.

        Args:
            run: must not keep the lane's memory; what it raises is logged.
            give_up: called instead of `run`, or after it failed; on any thread.
        """
        self.notice_overdue()
        with self._lock:
            is_refused = (
                self._is_closed or self._tasks.qsize() >= _MAX_WAITING or self._breaker.state is BreakerState.OPEN
            )
            if not is_refused:
                self._tasks.put(_Task(run, give_up))
                if sum(not lane.is_retired for lane in self._lanes) < self._config.count:
                    self._start_lane()
        if is_refused:
            give_up()

    def call(self, run: Callable[[Lane], Result], timeout_s: float) -> Result:
        """Have a thread run something, and wait for it.

        Raises:
            StoreIOError: it failed, or took longer than `timeout_s`.
            KVStoreError: what else `run` raised.
        """
        future: Future[Result] = Future()

        def keep(lane: Lane) -> None:
            try:
                future.set_result(run(lane))
            except KVStoreError as error:
                future.set_exception(error)

        def refuse() -> None:
            if not future.done():
                future.set_exception(StoreIOError(f"{self._transport.place}: not available"))

        self.submit(keep, refuse)
        try:
            return future.result(timeout_s)
        except FutureTimeoutError as error:
            self.notice_overdue()
            raise StoreIOError(f"{self._transport.place}: no answer within {timeout_s:g} s") from error

    def notice_overdue(self) -> None:
        """Count exchanges that take too long, and replace threads that are long past their deadline."""
        with self._lock:
            for lane in self._lanes:
                late_s = lane.overdue_s()
                num_left = sum(each.is_retired for each in self._lanes)
                if late_s > self._config.deadline_s and num_left < _MAX_LEFT_BEHIND:
                    lane.is_retired = True

    def close(self, timeout_s: float) -> None:
        """Let queued tasks end, then the threads; those that hang longer than `timeout_s` are left behind."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            threads = list(self._lanes.values())
            for _ in threads:
                self._tasks.put(None)
        until_s = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        while not self._tasks.empty():  # what nobody is left to run
            with suppress(queue.Empty):
                task = self._tasks.get_nowait()
                if task is not None:
                    task.give_up()
        if not any(thread.is_alive() for thread in threads):
            self._transport.close()

    def _start_lane(self) -> None:
        lane = Lane(self._transport, self._breaker, self._config)
        # Daemons: a thread that hangs inside a library must not keep the process from ending.
        thread = threading.Thread(target=self._serve, args=(lane,), name="kvstore-remote", daemon=True)
        self._lanes[lane] = thread
        thread.start()

    def _serve(self, lane: Lane) -> None:
        try:
            while not lane.is_retired:
                task = self._tasks.get()
                if task is None:
                    return
                self._run(task, lane)
        finally:
            lane.close()
            with self._lock:
                del self._lanes[lane]

    def _run(self, task: _Task, lane: Lane) -> None:
        is_done = False
        try:
            task.run(lane)
            is_done = True
        except StoreIOError as error:
            _LOG.debug("remote tier: %s", error)
        except KVStoreError as error:
            _LOG.warning("remote tier: a call to %s was given up: %s", self._transport.place, error)
        finally:
            if not is_done:
                task.give_up()
