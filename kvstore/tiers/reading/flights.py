# SPDX-License-Identifier: Apache-2.0
"""Reads under way, by block: who asks for a block that somebody is reading waits for those bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from kvstore.spec import BlockKey
from kvstore.tiers.moving.ticket import BatchTicket

Wanted: TypeAlias = "tuple[BlockKey, range | None]"
"""A block, and the layers of it: None for all."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One asker of a flight: where the bytes go, and the right to write there."""

    ticket: BatchTicket
    item: int
    slot: Tensor


@dataclass(slots=True)
class Flight:
    """One read: its asker, and those who came later and wait for its bytes.

    `ended` is set when nobody will be served any more: who still has no outcome then goes on alone.
    """

    wanted: Wanted
    seats: list[Seat]
    ended: threading.Event = field(default_factory=threading.Event)


class Flights:
    """The reads under way of one store. Thread-safe.

    A reader never waits for other flights before its own have ended, so nobody waits in a circle.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Wanted, Flight] = {}

    def board(self, wanted: Wanted, seat: Seat) -> tuple[Flight, bool]:
        """Join the flight that brings a block, or start one; True says that the caller has to read."""
        with self._lock:
            flight = self._flights.get(wanted)
            if flight is not None:
                flight.seats.append(seat)
                return flight, False
            flight = self._flights[wanted] = Flight(wanted, [seat])
            return flight, True

    def claim(self, flight: Flight) -> Seat | None:
        """Claim the first asker whose slot may still be written; None when nobody is left to want the bytes."""
        with self._lock:
            seats = list(flight.seats)
        return next((seat for seat in seats if seat.ticket.claim(seat.item)), None)

    def land(self, flight: Flight) -> list[Seat]:
        """Close a flight to newcomers, after which its bytes can be found elsewhere; returns all its askers."""
        with self._lock:
            if self._flights.get(flight.wanted) is flight:
                del self._flights[flight.wanted]
            return list(flight.seats)

    def end(self, flights: Iterable[Flight]) -> None:
        """Land flights and let those who wait for them go on, served or not."""
        for flight in flights:
            self.land(flight)
            flight.ended.set()
