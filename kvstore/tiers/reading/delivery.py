# SPDX-License-Identifier: Apache-2.0
"""Hands the blocks of one batch, as they come, to all who want them: into slots, and into the host tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome
from kvstore.tiers.reading.block_reader import Decode, Sought
from kvstore.tiers.reading.flights import Flight, Flights, Seat
from kvstore.tiers.reading.host_copies import HostCopies


class Delivery:
    """Delivers what one batch reads. Threads may deliver different items at once.

    Args:
        copies: the way into the host tier, and from slot to slot.
        registry: where the flights are.
        items: what the batch reads, by number.
        flights: the flight of each.
        owners: of the items that the host tier shall have a copy of: whose share it is counted to.
        asked_at: `HostTier.num_forgotten` before the look-up; see `Lease.publish`.
    """

    def __init__(
        self,
        copies: HostCopies,
        registry: Flights,
        items: Mapping[int, Sought],
        flights: Mapping[int, Flight],
        owners: Mapping[int, str],
        asked_at: int,
    ) -> None:
        self._copies = copies
        self._registry = registry
        self._items = items
        self._flights = flights
        self._owners = owners
        self._asked_at = asked_at
        self.shared: list[BlockKey] = []
        """Blocks that were handed on to others who waited, once for each."""

    def deliver(self, numbers: Sequence[int], decode: Decode, source: Outcome) -> None:
        """Decode items into the first slots that are still wanted, keep copies, hand copies to all who waited."""
        wanted = self._serve({number: self._flights[number].seats[0] for number in numbers}, decode, source)
        if len(wanted) == len(numbers):
            return
        for number in set(numbers).difference(wanted):  # whoever asked first does not want it any more
            for seat in self._flights[number].seats[1:]:
                if self._serve({number: seat}, decode, source):
                    break

    def _serve(self, seats: Mapping[int, Seat], decode: Decode, source: Outcome) -> list[int]:
        """Serve seats of one ticket; returns the numbers of those that are still wanted."""
        by_item = {seat.item: number for number, seat in seats.items()}
        with next(iter(seats.values())).ticket.claiming_some(list(by_item)) as claims:
            wanted = [by_item[item] for item in claims.held]
            came = decode({number: seats[number].slot for number in wanted}) if wanted else []
            for number in came:
                claims.outcomes[seats[number].item] = source
            kept = [number for number in came if number in self._owners]
            if kept:
                blocks = [(self._items[number].key, self._owners[number], seats[number].slot) for number in kept]
                self._copies.admit(blocks, self._asked_at)
            self._registry.land(self._flights[number] for number in came)
            for number in came:
                if len(self._flights[number].seats) > 1:
                    self._hand_on(number, seats[number], source)
        return wanted

    def _hand_on(self, number: int, served: Seat, source: Outcome) -> None:
        flight, item = self._flights[number], self._items[number]
        for seat in flight.seats:
            with seat.ticket.claiming(seat.item) as claim:  # the one that was served is claimed already
                if claim.is_held:
                    self._copies.copy(served.slot, seat.slot, item.layers)
                    claim.outcome = source
                    self.shared.append(item.key)
        self._registry.end([flight])  # who waited need not wait for the rest of this batch
