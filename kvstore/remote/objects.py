# SPDX-License-Identifier: Apache-2.0
"""Values of any length on a server: cut into parts that are named by their content, and a head that lists them."""

from __future__ import annotations

import hashlib
import struct
import time

from kvstore.errors import CapacityError, ConfigError, CorruptRecordError, StoreIOError
from kvstore.remote.envelope import ENVELOPE_NBYTES, Kind, Namespace, seal, unseal
from kvstore.remote.lane import Lane
from kvstore.remote.transport import Span
from kvstore.tiers.base import Outcome

MAX_OBJECT_NBYTES = 1 << 30

_PART_NBYTES = 1 << 20
_LEAST_NBYTES_PER_S = 32 << 20
_TOTAL = struct.Struct("<Q")
_NAME_NBYTES = 32


def object_key(kind: str, name: bytes) -> bytes:
    """32 bytes that name an object of a kind."""
    return hashlib.blake2b(name, digest_size=_NAME_NBYTES, person=kind.encode()).digest()


def has_object(lane: Lane, namespace: Namespace, key: bytes, deadline_s: float) -> bool:
    """Say whether there is an object of that key; raises `StoreIOError`."""
    return _has(lane, namespace.key(Kind.HEAD, key), deadline_s)


def send_object(
    lane: Lane,
    namespace: Namespace,
    key: bytes,
    data: bytes,
    deadline_s: float,
    max_nbytes: int = MAX_OBJECT_NBYTES,
) -> None:
    """Store an object, in place of an older one of that key. Parts that the server has are not sent.

    Raises:
        CapacityError: the server is full.
        ConfigError: larger than `max_nbytes`.
        StoreIOError: the server failed.
    """
    if len(data) > max_nbytes:
        raise ConfigError(f"an object of {len(data)} bytes is too large to share; {max_nbytes} is the most")
    names = bytearray()
    for start in range(0, len(data), _PART_NBYTES):
        part = data[start : start + _PART_NBYTES]
        name = hashlib.blake2b(part, digest_size=_NAME_NBYTES).digest()
        names += name
        text = namespace.key(Kind.PART, name)
        if not _has(lane, text, deadline_s):
            _send(lane, namespace, Kind.PART, name, part, deadline_s)
    _send(lane, namespace, Kind.HEAD, key, _TOTAL.pack(len(data)) + names, deadline_s)


def fetch_object(lane: Lane, namespace: Namespace, key: bytes, deadline_s: float, max_nbytes: int) -> bytes | None:
    """Fetch an object part by part; None when there is none, or parts of it are gone.

    Args:
        lane: talks to the server.
        namespace: where it is.
        key: its `object_key`.
        deadline_s: seconds for each exchange; for all of them together as many, and one more for every 32 MiB.
        max_nbytes: the most that an object of its kind can take; nothing of a larger one is fetched.

    Raises:
        CorruptRecordError: what the server has under that name is damaged, too large, or something else.
        StoreIOError: the server failed, or was too slow.
    """
    until_s = time.monotonic() + deadline_s
    head = _fetch(lane, namespace, Kind.HEAD, key, deadline_s)
    if head is None:
        return None
    if len(head) < _TOTAL.size or (len(head) - _TOTAL.size) % _NAME_NBYTES:
        raise CorruptRecordError(f"remote object: a head of {len(head)} bytes")
    (total,) = _TOTAL.unpack_from(head)
    names = [head[at : at + _NAME_NBYTES] for at in range(_TOTAL.size, len(head), _NAME_NBYTES)]
    if total > max_nbytes:
        raise CorruptRecordError(f"remote object: {total} bytes, where {max_nbytes} are the most")
    if len(names) != -(-total // _PART_NBYTES):
        raise CorruptRecordError(f"remote object: {len(names)} parts of {total} bytes")
    until_s += total / _LEAST_NBYTES_PER_S
    data = bytearray()
    for name in names:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise StoreIOError(f"remote object: {len(data)} of {total} bytes when its time was over")
        part = _fetch(lane, namespace, Kind.PART, name, min(left_s, deadline_s))
        if part is None:
            return None
        if hashlib.blake2b(part, digest_size=_NAME_NBYTES).digest() != name:
            raise CorruptRecordError("remote object: a part is not the one that its head names")
        data += part
    if len(data) != total:
        raise CorruptRecordError(f"remote object: {len(data)} bytes, {total} announced")
    return bytes(data)


def _has(lane: Lane, text: str, deadline_s: float) -> bool:
    return lane.ask(lambda link, until_s: link.exists([text], until_s), deadline_s)[0]


def _send(lane: Lane, namespace: Namespace, kind: Kind, key: bytes, data: bytes, deadline_s: float) -> None:
    room = lane.scratch(ENVELOPE_NBYTES + len(data))
    lane.part(room)[ENVELOPE_NBYTES:] = data
    seal(lane.part(room), kind, namespace.fingerprint, key)
    text = namespace.key(kind, key)
    (outcome,) = lane.ask(lambda link, until_s: link.put([text], [room], until_s, replace=True), deadline_s)
    if outcome is not Outcome.STORED:
        raise CapacityError("the remote tier is full; remove something there, or give it more memory")


def _fetch(lane: Lane, namespace: Namespace, kind: Kind, key: bytes, deadline_s: float) -> bytes | None:
    room = lane.scratch(ENVELOPE_NBYTES + _PART_NBYTES)
    text = namespace.key(kind, key)
    (found,) = lane.ask(lambda link, until_s: link.get([text], [room], until_s), deadline_s)
    if isinstance(found, Outcome):
        if found is Outcome.DAMAGED:
            raise CorruptRecordError("remote object: the server has something else under its name")
        return None
    return bytes(unseal(lane.part(Span(room.offset, found)), kind, namespace.fingerprint, key))
