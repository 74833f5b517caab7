# SPDX-License-Identifier: Apache-2.0
"""Carries parts of batches: encodes slots and sends them, receives values and decodes them into slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvstore.codec import Profile, probe
from kvstore.errors import CapacityError, CorruptRecordError, KVStoreError, StoreIOError
from kvstore.layout import BlockLayout
from kvstore.remote.calibrations import RemoteCalibrations
from kvstore.remote.envelope import ENVELOPE_NBYTES, Kind, Namespace, seal, unseal
from kvstore.remote.lane import Lane
from kvstore.remote.transport import Span
from kvstore.spec import BlockKey
from kvstore.stats import Meter, TierStats
from kvstore.telemetry.fault_log import log_fault
from kvstore.tiers.base import Outcome
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.moving.ticket import BatchTicket

_MAX_DAMAGED = 4096


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call asked for; `num_tokens` is empty for a read."""

    ticket: BatchTicket
    keys: Sequence[BlockKey]
    slots: Sequence[Tensor]
    num_tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Value:
    """An encoded block in a lane's memory."""

    key: BlockKey
    text: str
    span: Span


class Courier:
    """Codec and checks of one layout. Thread-safe; every lane calls it with its own memory.

    Args:
        space: namespace of the blocks.
        layout: layout of the slots.
        profile: how new blocks are coded.
        calibrations: what lossy profiles need.
        meter: counts what moves.
        deadline_s: seconds for each exchange about a calibration.
    """

    def __init__(
        self,
        space: Namespace,
        layout: BlockLayout,
        profile: Profile,
        calibrations: RemoteCalibrations,
        meter: Meter,
        deadline_s: float,
    ) -> None:
        self._space = space
        self._calibrations = calibrations
        self._spec = layout.spec
        self._codecs = CodecShelf(calibrations, layout, profile)
        self._meter = meter
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._damaged: set[BlockKey] = set()
        self.room_nbytes = ENVELOPE_NBYTES + self._codecs.bound(layout.block_tokens)

    def put(self, lane: Lane, batch: Batch, items: Sequence[int]) -> None:
        """Store some items of a batch; those that are still open when it ends have their outcomes.

        Raises:
            KVStoreError: the server failed, or a calibration is damaged; items are left open.
        """
        ticket = batch.ticket
        texts = [self._space.key(Kind.BLOCK, batch.keys[item]) for item in items]
        present = lane.ask(lambda link, until_s: link.exists(texts, until_s))
        values: dict[int, _Value] = {}
        began_s = time.perf_counter()
        for item, text, room, is_present in zip(
            items, texts, lane.rooms(len(items), self.room_nbytes), present, strict=True
        ):
            key = batch.keys[item]
            if is_present and key not in self._damaged:
                ticket.settle(item, Outcome.STORED)
            elif ticket.claim(item):
                try:
                    out = lane.part(room)[ENVELOPE_NBYTES:]
                    nbytes = self._codecs.encoder().encode(batch.slots[item], batch.num_tokens[item], 0, out)
                    values[item] = _Value(key, text, Span(room.offset, ENVELOPE_NBYTES + nbytes))
                finally:
                    ticket.unclaim(item, None)
        self._meter.add(TierStats(encode_s=time.perf_counter() - began_s))
        if values:
            self._send(lane, ticket, values)

    def get(self, lane: Lane, batch: Batch, items: Sequence[int]) -> None:
        """Bring some items of a batch; see `put`."""
        texts = [self._space.key(Kind.BLOCK, batch.keys[item]) for item in items]
        rooms = lane.rooms(len(items), self.room_nbytes)
        began_s = time.perf_counter()
        replies = lane.ask(lambda link, until_s: link.get(texts, rooms, until_s))
        received_s = time.perf_counter()
        num_read = nbytes = 0
        for item, room, reply in zip(items, rooms, replies, strict=True):
            if isinstance(reply, Outcome):
                outcome = reply
                batch.ticket.settle(item, reply)
                if reply is Outcome.DAMAGED:
                    self._damage(batch.keys[item], "the value is too large, or no value")
            else:
                outcome = self._decode(lane, batch, item, Span(room.offset, reply))
                num_read += outcome is Outcome.REMOTE
                nbytes += reply
        decode_s = time.perf_counter() - received_s
        self._meter.add(
            TierStats(read_blocks=num_read, read_nbytes=nbytes, read_s=received_s - began_s, decode_s=decode_s)
        )

    def _send(self, lane: Lane, ticket: BatchTicket, values: dict[int, _Value]) -> None:
        began_s = time.perf_counter()
        parts = [lane.part(value.span) for value in values.values()]
        for identity in {probe(part[ENVELOPE_NBYTES:]).calibration_id for part in parts}:
            try:
                self._calibrations.send(lane, identity, self._deadline_s)
            except CapacityError:
                for item in values:
                    ticket.settle(item, Outcome.FULL)
                return
        for value, part in zip(values.values(), parts, strict=True):
            seal(part, Kind.BLOCK, self._space.fingerprint, value.key)
        texts, spans = [value.text for value in values.values()], [value.span for value in values.values()]
        must_replace = any(value.key in self._damaged for value in values.values())
        outcomes = lane.ask(lambda link, until_s: link.put(texts, spans, until_s, replace=must_replace))
        stored: list[_Value] = []
        for (item, value), outcome in zip(values.items(), outcomes, strict=True):
            ticket.settle(item, outcome)
            if outcome is Outcome.STORED:
                stored.append(value)
        with self._lock:
            self._damaged.difference_update(value.key for value in stored)
        nbytes = sum(value.span.nbytes for value in stored)
        write_s = time.perf_counter() - began_s
        self._meter.add(TierStats(written_blocks=len(stored), written_nbytes=nbytes, write_s=write_s))

    def _decode(self, lane: Lane, batch: Batch, item: int, value: Span) -> Outcome:
        """Check and decode one value, and end its item; the slot is touched only while the item is open."""
        try:
            record = unseal(lane.part(value), Kind.BLOCK, self._space.fingerprint, batch.keys[item])
            info = probe(record)
            if info.total_nbytes != len(record):
                raise CorruptRecordError(f"record of {info.total_nbytes} bytes in {len(record)}")
            self._calibrations.bring(lane, info.calibration_id, self._spec, self._deadline_s)
            codec = self._codecs.decoder(info)
        except StoreIOError:  # of its calibration; the others of the batch are here
            batch.ticket.settle(item, Outcome.UNAVAILABLE)
            return Outcome.UNAVAILABLE
        except KVStoreError as error:
            batch.ticket.settle(item, Outcome.DAMAGED)
            return self._damage(batch.keys[item], error)
        if not batch.ticket.claim(item):
            return Outcome.TIMED_OUT
        outcome = Outcome.DAMAGED
        try:
            codec.decode_planes(info, record, 0, batch.slots[item], layers=range(info.num_layers))
            outcome = Outcome.REMOTE
        except KVStoreError as error:
            self._damage(batch.keys[item], error)
        finally:
            batch.ticket.unclaim(item, outcome)
        return outcome

    def _damage(self, key: BlockKey, reason: KVStoreError | str) -> Outcome:
        """Tell of a damaged block, and remember that the next put replaces it."""
        log_fault("remote block damaged", namespace=self._space.name, key=key.hex(), reason=str(reason))
        with self._lock:
            if len(self._damaged) < _MAX_DAMAGED:
                self._damaged.add(key)
        return Outcome.DAMAGED
