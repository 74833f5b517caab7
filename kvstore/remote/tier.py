# SPDX-License-Identifier: Apache-2.0
"""Remote tier: blocks of one layout on a server, behind the interface that all block stores share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from kvstore.codec import Profile
from kvstore.errors import StoreIOError
from kvstore.layout import BlockLayout
from kvstore.remote.calibrations import RemoteCalibrations
from kvstore.remote.courier import Batch, Courier
from kvstore.remote.envelope import Kind, Namespace
from kvstore.remote.lane import Lane
from kvstore.remote.meter import RemoteMeter
from kvstore.remote.offers import Offers
from kvstore.remote.server import RemoteServer
from kvstore.spec import BlockKey
from kvstore.stats import RemoteStats
from kvstore.tiers.base import Outcome
from kvstore.tiers.block_store import Ticket
from kvstore.tiers.codec_shelf import CalibrationSource
from kvstore.tiers.moving.ticket import BatchTicket
from kvstore.tiers.slots import check_blocks, check_gets, check_keys

_MAX_ROOMS_NBYTES = 8 << 20
_MAX_BATCH_BLOCKS = 128
_MIN_PART_NBYTES = 2 << 20
"""Smaller parts are not worth a second thread: what they would gain they lose to Python's lock."""


class RemoteTier:
    """Blocks on a server; see `BlockStore` for what it promises. Best effort: a server may forget what it likes.

    Every value carries its key, its namespace and a checksum, so what is damaged, cut off or somebody else's ends as
    `DAMAGED`. A call ends by its deadline whatever the server does; a server that keeps failing is left alone for a
    while, and calls end as `UNAVAILABLE` at once.

    Args:
        server: the server and the namespace; closed with this.
        layout: layout of the slots.
        profile: how new blocks are coded. A bit-exact tier does not answer with lossy records.
        calibrations: of the store beside it: what lossy profiles code with. Those that others coded with are fetched.
        offers_nbytes: memory for appended blocks that wait to be sent.
    """

    def __init__(
        self,
        server: RemoteServer,
        layout: BlockLayout,
        profile: Profile = Profile.LOSSLESS,
        *,
        calibrations: CalibrationSource | None = None,
        offers_nbytes: int = 64 << 20,
    ) -> None:
        self._server = server
        self._layout = layout
        self._space = block_space(server.namespace, layout)
        self._meter = RemoteMeter()
        self._calibrations = RemoteCalibrations(server.namespace, calibrations)
        self._courier = Courier(
            self._space, layout, profile, self._calibrations, self._meter.tier, server.config.lanes.deadline_s
        )
        self._offers = Offers(server, self._space, self._calibrations, self._meter, offers_nbytes)

    def __enter__(self) -> RemoteTier:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def layout(self) -> BlockLayout:
        """Layout of every slot."""
        return self._layout

    def put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> list[Outcome]:
        """Store blocks; see `BlockStore.put`. `timeout_s` None is the server's usual deadline."""
        return self._ended(self.submit_put(keys, slots, num_tokens, timeout_s=timeout_s))

    def get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> list[Outcome]:
        """Bring blocks into slots; see `BlockStore.get`. `timeout_s` None is the server's usual deadline."""
        return self._ended(self.submit_get(keys, slots, timeout_s=timeout_s))

    def submit_put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> Ticket:
        """Like `put`, and return at once."""
        check_blocks(keys, slots, num_tokens, self._layout)
        ticket = _CountedTicket(len(keys), self._timeout_s(timeout_s), self._meter.count_writes)
        return self._submit(Batch(ticket, tuple(keys), tuple(slots), tuple(num_tokens)), self._courier.put)

    def submit_get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> Ticket:
        """Like `get`, and return at once."""
        check_gets(keys, slots, self._layout)
        ticket = _CountedTicket(len(keys), self._timeout_s(timeout_s), self._meter.count_reads)
        return self._submit(Batch(ticket, tuple(keys), tuple(slots)), self._courier.get)

    def exists(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Say per block whether it is there; what cannot be asked is not there."""
        check_keys(keys)
        try:
            return self._server.ask_exists(self._texts(keys), self._server.config.deadline_s)
        except StoreIOError:
            return [False] * len(keys)

    def remove(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Forget blocks; says per block whether it was there and is gone."""
        check_keys(keys)
        try:
            return self._server.ask_remove(self._texts(keys), self._server.config.deadline_s)
        except StoreIOError:
            return [False] * len(keys)

    def bring(self, keys: Sequence[BlockKey], slots: Sequence[Tensor], left_s: float | None) -> list[Outcome]:
        """Like `get`, within the usual deadline even when more time is left; see `Backing.bring`."""
        usual_s = self._server.config.deadline_s
        return self.get(keys, slots, timeout_s=usual_s if left_s is None else min(left_s, usual_s))

    def offer(self, key: BlockKey, record: memoryview) -> None:
        """Send an encoded block behind the caller's back; copies it and never waits: what finds no room is dropped."""
        self._offers.add(key, record)

    def use_calibrations(self, source: CalibrationSource) -> None:
        """Take the calibrations of a store for those given before; see `Backing.use_calibrations`."""
        self._calibrations.use(source)

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was offered is sent or dropped; False when `timeout_s` passed first."""
        return self._offers.flush(timeout_s)

    def stats(self) -> RemoteStats:
        """Count what moved and what failed since this was opened."""
        return RemoteStats(
            tier=self._meter.tier.snapshot(),
            full=self._meter.ends(Outcome.FULL),
            timed_out=self._meter.ends(Outcome.TIMED_OUT),
            unavailable=self._meter.ends(Outcome.UNAVAILABLE),
            breaker=self._server.breaker.state,
            breaker_opened=self._server.breaker.num_opened,
            queued_offers=self._offers.num_queued,
            dropped_offers=self._offers.num_dropped,
            threads_left_behind=self._server.lanes.num_left_behind,
        )

    def close(self) -> None:
        """Finish what was submitted, within the usual deadline; offers that are still queued then are dropped."""
        self._offers.flush(self._server.config.deadline_s)
        self._server.close()

    def _timeout_s(self, timeout_s: float | None) -> float:
        return self._server.config.deadline_s if timeout_s is None else timeout_s

    def _ended(self, ticket: Ticket) -> list[Outcome]:
        outcomes = ticket.wait()
        assert outcomes is not None, "its deadline ends it"
        if Outcome.TIMED_OUT in outcomes:
            self._server.lanes.notice_overdue()
        return outcomes

    def _texts(self, keys: Sequence[BlockKey]) -> list[str]:
        return [self._space.key(Kind.BLOCK, key) for key in keys]

    def _submit(self, batch: Batch, carry: Callable[[Lane, Batch, Sequence[int]], None]) -> Ticket:
        """Cut a batch so that all lanes work on it, and each part fits a lane's memory."""
        count, ticket, room_nbytes = len(batch.keys), batch.ticket, self._courier.room_nbytes
        most = max(1, min(_MAX_ROOMS_NBYTES // room_nbytes, _MAX_BATCH_BLOCKS))
        share = max(-(-count // self._server.config.lanes.count), _MIN_PART_NBYTES // room_nbytes)
        step = max(1, min(most, share))
        for first in range(0, count, step):
            items = range(first, min(first + step, count))

            def run(lane: Lane, items: Sequence[int] = items) -> None:
                open_items = [item for item in items if ticket.is_open(item)]
                if open_items:
                    carry(lane, batch, open_items)

            def give_up(items: Sequence[int] = items) -> None:
                ticket.settle_rest(Outcome.UNAVAILABLE, items)

            self._server.lanes.submit(run, give_up)
        return ticket


class _CountedTicket(BatchTicket):
    """Tells how its blocks ended to a counter, once, when somebody sees the end; also of one who only asks `done`."""

    def __init__(self, num_items: int, timeout_s: float, count: Callable[[list[Outcome]], None]) -> None:
        super().__init__(num_items, timeout_s)
        self._count = count
        self._counting = threading.Lock()  # taken by the first who counts, and kept

    def done(self) -> bool:
        """See `BatchTicket.done`."""
        return super().done() and self.wait() is not None

    def wait(self, timeout_s: float | None = None) -> list[Outcome] | None:
        """See `BatchTicket.wait`."""
        outcomes = super().wait(timeout_s)
        if outcomes is not None and self._counting.acquire(blocking=False):
            self._count(outcomes)
        return outcomes


def block_space(namespace: Namespace, layout: BlockLayout) -> Namespace:
    """The part of a namespace that holds the blocks of one model."""
    return Namespace(namespace.name, layout.spec.fingerprint)
