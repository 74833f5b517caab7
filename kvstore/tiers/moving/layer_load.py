# SPDX-License-Identifier: Apache-2.0
"""Layer-wise loads: layer 0 of all blocks comes first, and is usable while the others are on their way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvstore.errors import ShapeError
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
        self._is_telling = False
        self._is_cancelled = False

    def wait(self, layer: int, timeout_s: float | None = None) -> list[Outcome] | None:
        """Return one outcome per block once a layer has come; None when `timeout_s` passed first.

        After `cancel` it waits for all layers: once it has returned outcomes, nothing is written to a slot any more.

        Raises:
            ShapeError: there is no such layer.
        """
        number = next((number for number, layers in enumerate(self._groups) if layer in layers), None)
        if number is None:
            raise ShapeError(f"layer {layer}: blocks have layers 0 to {self._groups[-1].stop - 1}")
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        outcomes = self._tickets[number].wait(timeout_s)
        for ticket in self._tickets if self._is_cancelled else ():
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            if ticket.wait(left_s) is None:
                return None
        return outcomes

    def done(self) -> bool:
        """True when every layer has come; never blocks."""
        return all(ticket.done() for ticket in self._tickets)

    def cancel(self) -> None:
        """End the layers that have not come as `CANCELLED`; after `wait` for any layer the slots are free again."""
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
        """Tell of what has come, one thread at a time: the other one reads on meanwhile."""
        while True:
            with self._lock:
                number = self._told
                if self._is_telling or number == len(self._groups) or not self._tickets[number].done():
                    return  # who tells looks again afterwards
                self._is_telling = True
            try:
                if self._on_layers is not None:
                    self._on_layers(self._groups[number], self._tickets[number].outcomes())
            finally:
                with self._lock:
                    self._told += 1
                    self._is_telling = False
