# SPDX-License-Identifier: Apache-2.0
"""The ticket of one batch: which items have ended and how, and who may touch an item's slot at any moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from kvstore.errors import ConfigError
from kvstore.tiers.base import Outcome


class Claim:
    """The right to touch an item's slot inside a `with` block, if `is_held`: else it has ended, or another has it.

    However the block is left, by Ctrl-C too, the right is given back: with `outcome`, or with None and the item open.
    """

    __slots__ = ("_item", "_ticket", "is_held", "outcome")

    def __init__(self, ticket: BatchTicket, item: int) -> None:
        self._ticket = ticket
        self._item = item
        self.is_held = False
        self.outcome: Outcome | None = None

    def __enter__(self) -> Claim:
        try:
            self._ticket._claim(self._item, self)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.is_held:
            self.is_held = False
            self._ticket.unclaim(self._item, self.outcome)


class Claims:
    """Like `Claim`, of several items: those that it got are `held`; they end as `outcomes` says, else stay open."""

    __slots__ = ("_items", "_ticket", "held", "outcomes")

    def __init__(self, ticket: BatchTicket, items: Sequence[int]) -> None:
        self._ticket = ticket
        self._items = items
        self.held: list[int] = []
        self.outcomes: dict[int, Outcome] = {}

    def __enter__(self) -> Claims:
        try:
            self._ticket._claim_some(self._items, self)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.held:
            self._ticket._unclaim_some(self.held, self.outcomes)


class BatchTicket:
    """Outcomes of a batch, item by item; what `kvstore.tiers.block_store.Ticket` promises. Thread-safe.

    Whoever moves an item's bytes claims it for just as long as it touches the caller's slot. Time and cancellation end
    open items at once, and claimed ones only when the claim ends, so nothing is written to a slot, or read from it,
    after its outcome is known. No thread watches the clock: whoever looks at the ticket does.

    Args:
        num_items: blocks of the batch.
        timeout_s: seconds after which open items end as `TIMED_OUT`; None for never.
        on_cancel: called after `cancel`, to wake who waits for something else than the ticket.

    Raises:
        ConfigError: `timeout_s` is negative or not a number.
    """

    def __init__(
        self, num_items: int, timeout_s: float | None = None, on_cancel: Callable[[], None] | None = None
    ) -> None:
        if timeout_s is not None and not timeout_s >= 0:
            raise ConfigError(f"timeout_s is {timeout_s}; use seconds from 0 on, or None to wait as long as it takes")
        self._lock = threading.Lock()  # itself in `with`, unlike a condition, it is never left locked by an interrupt
        self._changed = threading.Condition(self._lock)
        self._outcomes: list[Outcome | None] = [None] * num_items
        self._claimed: set[int] = set()
        self._num_open = num_items
        self._deadline_s = _end_of(timeout_s)
        self._early: Outcome | None = None
        self._on_cancel = on_cancel

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline, 0 when it has passed or all is cancelled; None without one."""
        if self._early is not None:
            return 0.0
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def is_open(self, item: int) -> bool:
        """True when an item has no outcome yet."""
        with self._lock:
            self._expire()
            return self._outcomes[item] is None

    def open_items(self, items: Sequence[int]) -> list[int]:
        """Return those of some items that have no outcome yet."""
        with self._lock:
            self._expire()
            return [item for item in items if self._outcomes[item] is None]

    def peek(self, items: Sequence[int]) -> list[Outcome]:
        """Return the outcomes of some items that have ended."""
        with self._lock:
            return [outcome for item in items if (outcome := self._outcomes[item]) is not None]

    def claiming(self, item: int) -> Claim:
        """Claim an item for the length of a `with` block."""
        return Claim(self, item)

    def claiming_some(self, items: Sequence[int]) -> Claims:
        """Claim those of some items that can be had for the length of a `with` block."""
        return Claims(self, items)

    def claim(self, item: int) -> bool:
        """Take the right to touch an item's slot until `unclaim`; False when it has ended, or somebody else has it."""
        return self._claim(item)

    def claim_open(self, items: Sequence[int]) -> list[int]:
        """`claim` many; returns which of them, by their place in `items`."""
        with self._lock:
            self._expire()
            found = [
                place for place, item in enumerate(items) if self._outcomes[item] is None and item not in self._claimed
            ]
            self._claimed.update(items[place] for place in found)
            return found

    def unclaim_all(self, items: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """`unclaim` many."""
        with self._lock:
            self._claimed.difference_update(items)
            for item, outcome in zip(items, outcomes, strict=True):
                self._end(item, outcome)
            self._changed.notify_all()

    def unclaim(self, item: int, outcome: Outcome | None) -> None:
        """Give a claim back, with the item's outcome; None leaves it open, unless its time has run out meanwhile."""
        with self._lock:
            self._claimed.discard(item)
            self._end(item, outcome or self._early)
            self._changed.notify_all()

    def settle(self, item: int, outcome: Outcome) -> None:
        """End an item that nobody has claimed; does nothing to one that has ended."""
        with self._lock:
            self._expire()
            assert item not in self._claimed, f"item {item} is being moved"
            self._end(item, outcome)

    def settle_all(self, items: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """`settle` many."""
        with self._lock:
            self._expire()
            assert self._claimed.isdisjoint(items), f"some of {items} are being moved"
            for item, outcome in zip(items, outcomes, strict=True):
                self._end(item, outcome)

    def settle_rest(self, outcome: Outcome, items: Sequence[int] | None = None) -> list[Outcome]:
        """End those of some items, or of all, that are open, wait for those that are claimed, return their outcomes."""
        chosen = range(len(self._outcomes)) if items is None else items
        with self._lock:
            self._expire()
            self._end_open(outcome, chosen)
            self._changed.wait_for(lambda: self._claimed.isdisjoint(chosen))
            self._end_open(outcome, chosen)
            return [self._outcomes[item] or outcome for item in chosen]

    def done(self) -> bool:
        """True when every item has its outcome; never blocks."""
        with self._lock:
            self._expire()
            return self._num_open == 0

    def wait(self, timeout_s: float | None = None) -> list[Outcome] | None:
        """Return all outcomes; None when `timeout_s` passed first and the batch goes on."""
        until_s = _end_of(timeout_s)
        with self._lock:
            while True:
                self._expire()
                if self._num_open == 0:
                    return [outcome for outcome in self._outcomes if outcome is not None]
                now_s = time.monotonic()
                if until_s is not None and now_s >= until_s:
                    return None
                deadline_s = self._deadline_s if self._early is None else None  # past it, claims are waited for
                ends = [end for end in (until_s, deadline_s) if end is not None]
                self._changed.wait(min(ends) - now_s if ends else None)

    def outcomes(self) -> list[Outcome]:
        """Wait as long as it takes, and return all outcomes."""
        outcomes = self.wait()
        assert outcomes is not None, "waited without a limit"
        return outcomes

    def cancel(self) -> None:
        """End open items as `CANCELLED`; claimed ones too, if they do not end well."""
        with self._lock:
            self._expire()
            self._stop(Outcome.CANCELLED)
        if self._on_cancel is not None:
            self._on_cancel()

    def _claim(self, item: int, claim: Claim | None = None) -> bool:
        with self._lock:
            self._expire()
            if self._outcomes[item] is not None or item in self._claimed:
                return False
            if claim is not None:
                claim.is_held = True
            self._claimed.add(item)
            return True

    def _claim_some(self, items: Sequence[int], claims: Claims) -> None:
        with self._lock:
            self._expire()
            for item in items:
                if self._outcomes[item] is None and item not in self._claimed:
                    claims.held.append(item)
                    self._claimed.add(item)

    def _unclaim_some(self, items: Sequence[int], outcomes: Mapping[int, Outcome]) -> None:
        with self._lock:
            self._claimed.difference_update(items)
            for item in items:
                self._end(item, outcomes.get(item, self._early))
            self._changed.notify_all()

    def _expire(self) -> None:
        if self._deadline_s is not None and self._num_open and time.monotonic() >= self._deadline_s:
            self._stop(Outcome.TIMED_OUT)

    def _stop(self, outcome: Outcome) -> None:
        if self._early is None:
            self._early = outcome
            self._end_open(outcome, range(len(self._outcomes)))

    def _end_open(self, outcome: Outcome, items: Sequence[int]) -> None:
        for item in items:
            if item not in self._claimed:
                self._end(item, outcome)

    def _end(self, item: int, outcome: Outcome | None) -> None:
        if outcome is None or self._outcomes[item] is not None:
            return
        self._outcomes[item] = outcome
        self._num_open -= 1
        if self._num_open == 0:
            self._changed.notify_all()


def _end_of(span_s: float | None) -> float | None:
    """When a span that begins now ends, by the monotonic clock; None for one that never does."""
    return None if span_s is None else time.monotonic() + min(span_s, threading.TIMEOUT_MAX)
