# SPDX-License-Identifier: Apache-2.0
"""Tickets: how items end, and that nobody touches a slot whose item has ended."""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress

import pytest

from kvstore.errors import ConfigError
from kvstore.tiers.base import Outcome
from kvstore.tiers.moving.ticket import BatchTicket


def test_a_ticket_is_done_when_its_last_item_ends() -> None:
    ticket = BatchTicket(2)
    ticket.settle(1, Outcome.MISS)
    assert not ticket.done()
    assert ticket.wait(0) is None
    assert ticket.claim(0)
    ticket.unclaim(0, Outcome.DISK)
    assert ticket.wait() == [Outcome.DISK, Outcome.MISS]


def test_the_first_outcome_stays() -> None:
    ticket = BatchTicket(1)
    ticket.settle(0, Outcome.MISS)
    ticket.settle(0, Outcome.DAMAGED)
    ticket.cancel()
    assert not ticket.claim(0)
    assert ticket.wait() == [Outcome.MISS]


def test_an_item_is_claimed_by_one_at_a_time_and_may_be_given_back() -> None:
    ticket = BatchTicket(1)
    assert ticket.claim(0)
    assert not ticket.claim(0)
    ticket.unclaim(0, None)
    assert ticket.is_open(0)
    assert ticket.claim(0)


@pytest.mark.parametrize("ends_well", [False, True])
def test_a_cancelled_item_ends_when_its_claim_does(ends_well: bool) -> None:
    ticket = BatchTicket(2)
    assert ticket.claim(0)
    ticket.cancel()
    assert not ticket.done()
    assert not ticket.claim(1)
    ticket.unclaim(0, Outcome.DISK if ends_well else None)
    assert ticket.wait() == [Outcome.DISK if ends_well else Outcome.CANCELLED, Outcome.CANCELLED]


def test_time_ends_open_items_and_waits_for_claimed_ones() -> None:
    ticket = BatchTicket(2, 0.05)
    assert ticket.claim(1)
    waiter_is_back = threading.Event()
    outcomes: list[list[Outcome] | None] = []

    def wait() -> None:
        outcomes.append(ticket.wait())
        waiter_is_back.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    while ticket.is_open(0):
        time.sleep(0.01)
    assert not waiter_is_back.is_set(), "the slot of item 1 is being written"
    ticket.unclaim(1, Outcome.HOST)
    waiter.join(10)
    assert outcomes == [[Outcome.TIMED_OUT, Outcome.HOST]]


def test_a_claim_is_given_back_however_its_block_is_left() -> None:
    ticket = BatchTicket(2)
    with suppress(KeyboardInterrupt), ticket.claiming(0) as claim, ticket.claiming(0) as second:
        assert claim.is_held
        assert not second.is_held
        raise KeyboardInterrupt
    assert ticket.is_open(0)
    with ticket.claiming(0) as claim:
        claim.outcome = Outcome.HOST
    with ticket.claiming(0) as claim:
        assert not claim.is_held, "it has ended"
    assert ticket.settle_rest(Outcome.UNAVAILABLE) == [Outcome.HOST, Outcome.UNAVAILABLE]


def test_many_items_are_claimed_at_once_and_end_each_in_its_way() -> None:
    ticket = BatchTicket(5)
    ticket.settle(0, Outcome.HOST)
    assert ticket.claim(1)
    with ticket.claiming_some([0, 1, 2, 3]) as claims, ticket.claiming_some([2, 4]) as others:
        assert claims.held == [2, 3]
        assert others.held == [4]
        claims.outcomes[2] = Outcome.DISK
        ticket.cancel()
    with suppress(KeyboardInterrupt), ticket.claiming_some([3]):
        raise KeyboardInterrupt
    ticket.unclaim(1, None)
    assert ticket.outcomes() == [Outcome.HOST, Outcome.CANCELLED, Outcome.DISK, Outcome.CANCELLED, Outcome.CANCELLED]


def test_claims_of_many_are_given_back_by_an_interrupt() -> None:
    ticket = BatchTicket(3)
    with suppress(KeyboardInterrupt), ticket.claiming_some([0, 2]) as claims:
        claims.outcomes[0] = Outcome.DISK
        raise KeyboardInterrupt
    assert ticket.open_items([0, 1, 2]) == [1, 2]
    assert ticket.claim(2)


def test_the_rest_of_some_items_ends_and_the_others_go_on() -> None:
    ticket = BatchTicket(3)
    ticket.settle(0, Outcome.HOST)
    assert ticket.settle_rest(Outcome.UNAVAILABLE, [0, 1]) == [Outcome.HOST, Outcome.UNAVAILABLE]
    assert ticket.is_open(2)


def test_settling_the_rest_waits_for_claims() -> None:
    ticket = BatchTicket(1)
    assert ticket.claim(0)
    mover = threading.Timer(0.05, lambda: ticket.unclaim(0, Outcome.DISK))
    mover.start()
    assert ticket.settle_rest(Outcome.UNAVAILABLE) == [Outcome.DISK]
    mover.join(10)


@pytest.mark.parametrize("timeout_s", [-1.0, -0.001, math.nan])
def test_a_time_that_is_no_time_is_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="timeout_s"):
        BatchTicket(1, timeout_s)


def test_endless_time_is_no_deadline() -> None:
    ticket = BatchTicket(1, math.inf)
    assert ticket.wait(0) is None
    mover = threading.Timer(0.02, lambda: ticket.settle(0, Outcome.HOST))
    mover.start()
    assert ticket.wait(math.inf) == [Outcome.HOST]
    mover.join(10)
