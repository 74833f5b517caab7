# SPDX-License-Identifier: Apache-2.0
"""Appended blocks on their way to a server: a queue with bounded memory that drops what it cannot hold."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from kvstore.codec import probe
from kvstore.errors import CapacityError, KVStoreError, StoreIOError
from kvstore.remote.calibrations import RemoteCalibrations
from kvstore.remote.envelope import Namespace
from kvstore.remote.lane import Lane
from kvstore.remote.meter import RemoteMeter
from kvstore.remote.records import send_records
from kvstore.remote.server import RemoteServer
from kvstore.spec import BlockKey
from kvstore.stats import BreakerState, TierStats
from kvstore.tiers.base import Outcome

_MAX_BATCH_BLOCKS = 32
_MAX_BATCH_NBYTES = 4 << 20


class Offers:
    """Sends records one batch after another. Thread-safe; `add` never waits for the server.

    Args:
        server: where they go.
        space: namespace of the blocks.
        calibrations: sent along.
        meter: counts what was sent.
        max_nbytes: memory for what waits.
    """

    def __init__(
        self,
        server: RemoteServer,
        space: Namespace,
        calibrations: RemoteCalibrations,
        meter: RemoteMeter,
        max_nbytes: int,
    ) -> None:
        self._server = server
        self._space = space
        self._calibrations = calibrations
        self._meter = meter
        self._max_nbytes = max_nbytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[BlockKey, bytes]] = deque()
        self._waiting_nbytes = 0
        self._num_under_way = 0
        self._num_dropped = 0

    @property
    def num_queued(self) -> int:
        """Blocks that wait or are being sent."""
        with self._changed:
            return len(self._waiting) + self._num_under_way

    @property
    def num_dropped(self) -> int:
        """Blocks that were not sent."""
        with self._changed:
            return self._num_dropped

    def add(self, key: BlockKey, record: memoryview) -> None:
        """Queue a copy of a record; drops it when the queue is full or the server is left alone."""
        is_left_alone = self._server.breaker.state is BreakerState.OPEN
        with self._changed:
            if is_left_alone or self._waiting_nbytes + len(record) > self._max_nbytes:
                self._num_dropped += 1
                return
            self._waiting.append((key, bytes(record)))
            self._waiting_nbytes += len(record)
            is_first = self._num_under_way == 0
            if is_first:
                batch = self._take()
        if is_first:
            self._submit(batch)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued; False when `timeout_s` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._num_under_way == 0, timeout_s)

    def _take(self) -> list[tuple[BlockKey, bytes]]:
        """Take the next batch; the lock is held."""
        batch: list[tuple[BlockKey, bytes]] = []
        nbytes = 0
        while self._waiting and len(batch) < _MAX_BATCH_BLOCKS:
            nbytes += len(self._waiting[0][1])
            if batch and nbytes > _MAX_BATCH_NBYTES:
                break
            batch.append(self._waiting.popleft())
        self._waiting_nbytes -= sum(len(record) for _, record in batch)
        self._num_under_way = len(batch)
        return batch

    def _submit(self, batch: Sequence[tuple[BlockKey, bytes]]) -> None:
        def send(lane: Lane) -> None:
            num_dropped = self._send(lane, batch)
            with self._changed:
                self._num_dropped += num_dropped
                following = self._take()
                self._changed.notify_all()
            if following:
                self._submit(following)

        self._server.lanes.submit(send, self._drop_all)

    def _drop_all(self) -> None:
        """The server does not take what is under way: what waits behind it is dropped, too."""
        with self._changed:
            self._num_dropped += self._num_under_way + len(self._waiting)
            self._waiting.clear()
            self._waiting_nbytes = self._num_under_way = 0
            self._changed.notify_all()

    def _send(self, lane: Lane, batch: Sequence[tuple[BlockKey, bytes]]) -> int:
        """Send a batch; returns how many blocks the server did not take."""
        deadline_s = self._server.config.lanes.deadline_s
        needed = {probe(record).calibration_id for _, record in batch}
        try:
            for identity in needed:
                self._calibrations.send(lane, identity, deadline_s)
            outcomes, nbytes = send_records(lane, self._space, batch, deadline_s)
        except CapacityError:
            return len(batch)
        except StoreIOError:
            raise
        except KVStoreError:  # the calibration is gone: nobody could read the records
            return len(batch)
        num_stored = outcomes.count(Outcome.STORED)
        self._meter.tier.add(TierStats(written_blocks=num_stored, written_nbytes=nbytes))
        return len(batch) - num_stored
