# SPDX-License-Identifier: Apache-2.0
"""The circuit breaker, by a clock that the tests move."""

from __future__ import annotations

from kvstore.remote.breaker import Breaker, BreakerConfig
from kvstore.stats import BreakerState


class Clock:
    """Seconds that stand still until they are moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def made() -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(BreakerConfig(max_failures=3, first_wait_s=1.0, max_wait_s=4.0), clock), clock


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.failed()


def test_it_opens_after_failures_in_a_row() -> None:
    breaker, _ = made()
    fail(breaker, 2)
    assert breaker.admit()
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.admit(), "a success in between begins anew"
    breaker.failed()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.admit()
    assert breaker.num_opened == 1


def test_half_open_admits_one_and_its_success_closes() -> None:
    breaker, clock = made()
    fail(breaker, 3)
    clock.now_s += 0.99
    assert not breaker.admit()
    clock.now_s += 0.02
    assert str(breaker.state) == "half-open"
    assert breaker.admit()
    assert not breaker.admit(), "one trial at a time"
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, 2)
    assert breaker.state is BreakerState.CLOSED, "failures are counted anew"


def test_failed_trials_double_the_wait_up_to_a_cap() -> None:
    breaker, clock = made()
    fail(breaker, 3)
    waits = []
    for _ in range(4):
        began_s = clock.now_s
        while not breaker.admit():
            clock.now_s += 0.25
        waits.append(clock.now_s - began_s)
        breaker.failed()
    assert waits == [1.0, 2.0, 4.0, 4.0]
    assert breaker.num_opened == 5


def test_failures_of_calls_from_before_are_no_news() -> None:
    breaker, clock = made()
    fail(breaker, 10)
    clock.now_s += 1.01
    assert breaker.admit(), "they have not made the wait longer"


def test_a_late_success_closes_at_once() -> None:
    breaker, _ = made()
    fail(breaker, 3)
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED


def test_a_trial_without_a_result_does_not_keep_the_server_out() -> None:
    breaker, clock = made()
    fail(breaker, 3)
    clock.now_s += 1.01
    assert breaker.admit()
    clock.now_s += 4.01
    assert breaker.admit()
