# SPDX-License-Identifier: Apache-2.0
"""Layer-wise loads: layer 0 of all blocks comes first, and is usable while the others are on their way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvstore.tiers.base import Outcome
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.reading.fetcher import Fetcher
from kvstore.tiers.reading.request import FetchRequest


class LayerLoad:
    """A batch that comes a few layers at a time. Any thread may wait or cancel.

    Args:
        requests: whole blocks.
        num_layers: layers of a block.
        group_layers: layers that are read at once.
        on_layers: called with the layers that have just come and the outcomes per block, in order of layers, on a
            thread of the store; it must not raise.
    """

    def __init__(
        self,
        requests: Sequence[FetchRequest],
        num_layers: int,
        group_layers: int,
        on_layers: Callable[[range, Sequence[Outcome]], None] | None,
    ) -> None:
        self._requests = requests
        self._groups = [
            range(first, min(first + group_layers, num_layers)) for first in range(0, num_layers, group_layers)
        ]
        self._tickets = [BatchTicket(len(requests)) for _ in self._groups]
        self._on_layers = on_layers
        self._lock = threading.Lock()
        self._begun = 0
        self._told = 0
        self._is_cancelled = False

    def wait(self, layer: int, timeout_s: float | None = None) -> list[Outcome] | None:
        """Return one outcome per block once a layer has come; None when `timeout_s` passed first."""
        number = next(number for number, layers in enumerate(self._groups) if layer in layers)
        return self._tickets[number].wait(timeout_s)

    def done(self) -> bool:
        """True when every layer has come; never blocks."""
        return all(ticket.done() for ticket in self._tickets)

    def cancel(self) -> None:
        """End the layers that have not come as `CANCELLED`; after `wait` of the last one the slots are free again."""
        self._is_cancelled = True
        for ticket in self._tickets:
            ticket.cancel()

    def run(self, fetcher: Fetcher) -> None:
        """Bring the groups that nobody has begun, one after the other; two threads at once overlap read and decode."""
        while True:
            with self._lock:
                number = self._begun
                self._begun += 1
            if number >= len(self._groups):
                return
            ticket, layers = self._tickets[number], self._groups[number]
            try:
                if not self._is_cancelled:
                    fetcher.fetch([FetchRequest(each.key, each.slot, layers) for each in self._requests], ticket)
            finally:
                ticket.settle_rest(Outcome.UNAVAILABLE)
                self._tell()

    def _tell(self) -> None:
        with self._lock:
            while self._told < len(self._groups) and self._tickets[self._told].done():
                if self._on_layers is not None:
                    self._on_layers(self._groups[self._told], self._tickets[self._told].wait() or [])
                self._told += 1
