# SPDX-License-Identifier: Apache-2.0
"""Encoded blocks to a server and back, as they are."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.errors import KVStoreError
from kvstore.remote.envelope import ENVELOPE_NBYTES, Kind, Namespace, seal, unseal
from kvstore.remote.lane import Lane
from kvstore.remote.transport import Span
from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome


def send_records(
    lane: Lane, space: Namespace, batch: Sequence[tuple[BlockKey, bytes]], deadline_s: float
) -> tuple[list[Outcome], int]:
    """Send records that the server lacks.

    Args:
        lane: its memory takes the batch.
        space: namespace of the blocks.
        batch: keys and records.
        deadline_s: seconds for each of two exchanges.

    Returns:
        Per record `STORED` or `FULL`, and the bytes that were sent.

    Raises:
        StoreIOError: the server failed.
    """
    texts = [space.key(Kind.BLOCK, key) for key, _ in batch]
    present = lane.ask(lambda link, until_s: link.exists(texts, until_s), deadline_s)
    missing = [number for number, is_there in enumerate(present) if not is_there]
    outcomes = [Outcome.STORED] * len(batch)
    if not missing:
        return outcomes, 0
    largest = max(len(batch[number][1]) for number in missing)
    spans: list[Span] = []
    for number, room in zip(missing, lane.rooms(len(missing), ENVELOPE_NBYTES + largest), strict=True):
        key, record = batch[number]
        span = Span(room.offset, ENVELOPE_NBYTES + len(record))
        lane.part(span)[ENVELOPE_NBYTES:] = record
        seal(lane.part(span), Kind.BLOCK, space.fingerprint, key)
        spans.append(span)
    chosen = [texts[number] for number in missing]
    for number, outcome in zip(
        missing, lane.ask(lambda link, until_s: link.put(chosen, spans, until_s), deadline_s), strict=True
    ):
        outcomes[number] = outcome
    return outcomes, sum(span.nbytes for span in spans)


def fetch_records(
    lane: Lane, space: Namespace, keys: Sequence[BlockKey], room_nbytes: int, deadline_s: float
) -> list[bytes | None]:
    """Fetch records; None for one that is not there, is damaged or takes more than `room_nbytes` with its envelope.

    Raises:
        StoreIOError: the server failed.
    """
    texts = [space.key(Kind.BLOCK, key) for key in keys]
    rooms = lane.rooms(len(keys), room_nbytes)
    replies = lane.ask(lambda link, until_s: link.get(texts, rooms, until_s), deadline_s)
    records: list[bytes | None] = []
    for key, room, reply in zip(keys, rooms, replies, strict=True):
        record: bytes | None = None
        if not isinstance(reply, Outcome):
            try:
                value = unseal(lane.part(Span(room.offset, reply)), Kind.BLOCK, space.fingerprint, key)
                record = bytes(value)
            except KVStoreError:
                record = None
        records.append(record)
    return records
