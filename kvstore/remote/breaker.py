# SPDX-License-Identifier: Apache-2.0
"""Circuit breaker: a server that keeps failing is left alone, and tried again ever more rarely."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvstore.stats import BreakerState


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When a breaker opens and for how long.

    Args:
        max_failures: failures in a row that open it.
        first_wait_s: how long it stays open the first time; each failed trial doubles that.
        max_wait_s: and never above this.
    """

    max_failures: int = 3
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0


class Breaker:
    """Counts failures in a row. Thread-safe.

    Args:
        config: thresholds.
        clock: seconds that only grow.
    """

    def __init__(self, config: BreakerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._wait_s = config.first_wait_s
        self._open_until_s: float | None = None
        self._trial_until_s: float | None = None
        self._num_opened = 0

    @property
    def state(self) -> BreakerState:
        """What it does with the next call."""
        with self._lock:
            return self._state()

    @property
    def num_opened(self) -> int:
        """How often it has opened, failed trials included."""
        with self._lock:
            return self._num_opened

    def admit(self) -> bool:
        """Ask before a call; true in half-open state for one call until that has its result."""
        with self._lock:
            state = self._state()
            if state is BreakerState.HALF_OPEN:
                # A trial whose result never comes must not keep the server out for ever.
                self._trial_until_s = self._clock() + self._config.max_wait_s
            return state is BreakerState.CLOSED or state is BreakerState.HALF_OPEN

    def succeeded(self) -> bool:
        """Tell of a call that the server answered, however late; True when that closed it."""
        with self._lock:
            was_open = self._open_until_s is not None
            self._failures = 0
            self._wait_s = self._config.first_wait_s
            self._open_until_s = self._trial_until_s = None
            return was_open

    def failed(self) -> float | None:
        """Tell of a call that the server did not answer; returns for how many seconds that opened it, if it did."""
        with self._lock:
            self._failures += 1
            if self._open_until_s is not None:
                if self._clock() < self._open_until_s:
                    return None  # a call from before it opened: no news
                self._wait_s = min(2 * self._wait_s, self._config.max_wait_s)
            elif self._failures < self._config.max_failures:
                return None
            self._open_until_s = self._clock() + self._wait_s
            self._trial_until_s = None
            self._num_opened += 1
            return self._wait_s

    def _state(self) -> BreakerState:
        now_s = self._clock()
        if self._open_until_s is None:
            return BreakerState.CLOSED
        if now_s < self._open_until_s or (self._trial_until_s is not None and now_s < self._trial_until_s):
            return BreakerState.OPEN
        return BreakerState.HALF_OPEN
