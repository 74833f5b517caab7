# SPDX-License-Identifier: Apache-2.0
"""Threads that talk to a server, each with memory and a link of its own; callers leave a thread behind that hangs.

A library may hang for longer than a caller can wait, and write to its buffers when it wakes up. So bytes travel through
memory that belongs to the thread, and nobody waits for a thread: tickets and futures end by the clock.
"""

from __future__ import annotations

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
from kvstore.remote.breaker import Breaker
from kvstore.remote.lane import Lane, LaneConfig
from kvstore.remote.transport import Transport
from kvstore.stats import BreakerState
from kvstore.telemetry.fault_log import log_fault

_MAX_WAITING = 1024
_MAX_LEFT_BEHIND = 8

Result = TypeVar("Result")


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
        self._num_idle = 0
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
                num_lanes = sum(not lane.is_retired for lane in self._lanes)
                if self._tasks.qsize() > self._num_idle and num_lanes < self._config.count:
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
            lane.connect()
            while not lane.is_retired:
                task = self._next()
                if task is None:
                    return
                self._run(task, lane)
        finally:
            lane.close()
            with self._lock:
                del self._lanes[lane]

    def _next(self) -> _Task | None:
        with self._lock:
            self._num_idle += 1
        try:
            return self._tasks.get()
        finally:
            with self._lock:
                self._num_idle -= 1

    def _run(self, task: _Task, lane: Lane) -> None:
        is_done = False
        try:
            task.run(lane)
            is_done = True
        except StoreIOError:
            pass  # logged where it was counted, or not made since the breaker is open
        except KVStoreError as error:
            log_fault("remote call given up", server=self._transport.place, reason=str(error))
        finally:
            if not is_done:
                task.give_up()
