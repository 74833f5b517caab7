# SPDX-License-Identifier: Apache-2.0
"""Reads under way, by block: who asks for a block that somebody is reading waits for those bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import Tensor

from kvstore.spec import BlockKey
from kvstore.tiers.moving.ticket import BatchTicket

Wanted: TypeAlias = "tuple[BlockKey, range | None]"
"""A block, and the layers of it: None for all."""


class Seat:
    """One asker of a flight: where the bytes go, and whose item they are."""

    __slots__ = ("item", "slot", "ticket")

    def __init__(self, ticket: BatchTicket, item: int, slot: Tensor) -> None:
        self.ticket = ticket
        self.item = item
        self.slot = slot


class Flight:
    """One read: its asker, and those who came later and wait for its bytes.

    When it `is_over` nobody will be served any more: who still has no outcome goes on alone.
    """

    __slots__ = ("is_over", "seats", "wanted")

    def __init__(self, wanted: Wanted, seat: Seat) -> None:
        self.wanted = wanted
        self.seats = [seat]
        self.is_over = False


class Flights:
    """The reads under way of one store. Thread-safe.

    A reader never waits for other flights before its own have ended, so nobody waits in a circle.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # in `with`, as in `BatchTicket`
        self._changed = threading.Condition(self._lock)
        self._flights: dict[Wanted, Flight] = {}

    def board(self, wanted: Sequence[tuple[Wanted, Seat]], boarded: list[tuple[Flight, bool]]) -> None:
        """Join the flights that bring blocks, or start them.

        Args:
            wanted: the blocks, and who asks for them.
            boarded: gains one flight for each, and whether the caller has to read, and to `end` it however this ends.
        """
        with self._lock:
            for key, seat in wanted:
                flight = self._flights.get(key)
                if flight is None:
                    flight = Flight(key, seat)
                    boarded.append((flight, True))
                    self._flights[key] = flight
                else:
                    flight.seats.append(seat)
                    boarded.append((flight, False))

    def land(self, flights: Iterable[Flight]) -> None:
        """Close flights to newcomers, after which their bytes can be found elsewhere."""
        with self._lock:
            for flight in flights:
                if self._flights.get(flight.wanted) is flight:
                    del self._flights[flight.wanted]

    def end(self, flights: Iterable[Flight]) -> None:
        """Land flights and let those who wait for them go on, served or not."""
        with self._lock:
            for flight in flights:
                if self._flights.get(flight.wanted) is flight:
                    del self._flights[flight.wanted]
                flight.is_over = True
            self._changed.notify_all()

    def wait(self, flight: Flight, timeout_s: float | None) -> None:
        """Wait until a flight is over, or for `timeout_s` seconds."""
        with self._lock:
            self._changed.wait_for(lambda: flight.is_over, timeout_s)
