# SPDX-License-Identifier: Apache-2.0
"""What one thread needs to talk to a server: memory that belongs to it, a link, and how long an exchange may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from kvstore.errors import KVStoreError, StoreIOError
from kvstore.remote.breaker import Breaker
from kvstore.remote.transport import Link, Span, Transport
from kvstore.stats import BreakerState
from kvstore.telemetry.fault_log import log_fault

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
        if self._breaker.succeeded():
            log_fault("remote breaker closed", server=self._transport.place)
        return result

    def connect(self) -> None:
        """Open the link ahead of the first exchange: joining a cluster takes longer than a call may."""
        if self._breaker.state is not BreakerState.CLOSED:
            return
        self._is_counted = False
        self._began_s = time.monotonic()
        try:
            self._link = self._transport.connect(self._buffer, self._began_s + self._config.deadline_s)
        except StoreIOError as error:
            self._count_failure(error)
        finally:
            self._began_s = None

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
        log_fault("remote server failed", server=self._transport.place, reason=str(error))
        open_s = self._breaker.failed()
        if open_s is not None:
            log_fault("remote breaker opened", server=self._transport.place, for_s=open_s, reason=str(error))
