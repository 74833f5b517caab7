# SPDX-License-Identifier: Apache-2.0
"""Calibrations that lossy records need: sent along with the first record that names one, fetched when one is met."""

from __future__ import annotations

import time
from collections import OrderedDict
from threading import Lock
from typing import TypeVar

from kvstore.bases import MAX_CHANNELS
from kvstore.calibration import CALIBRATION_ID_NBYTES, Calibration, can_have_bases
from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError, KVStoreError
from kvstore.remote.envelope import Namespace
from kvstore.remote.lane import Lane
from kvstore.remote.objects import fetch_object, has_object, object_key, send_object
from kvstore.spec import ModelSpec
from kvstore.tiers.codec_shelf import CalibrationSource

Value = TypeVar("Value")

NO_CALIBRATION = bytes(CALIBRATION_ID_NBYTES)
_MAX_KNOWN = 64
_RETRY_S = 5.0


class RemoteCalibrations:
    """The calibrations of a store, and those that a server has. Thread-safe.

    Args:
        namespace: where they are on the server.
        local: the store's; None for a tier without a store.
    """

    def __init__(self, namespace: Namespace, local: CalibrationSource | None) -> None:
        self._namespace = namespace
        self._local = local
        self._lock = Lock()
        self._fetched: OrderedDict[bytes, Calibration] = OrderedDict()
        self._failed: OrderedDict[bytes, tuple[float, KVStoreError]] = OrderedDict()

    def use(self, local: CalibrationSource) -> None:
        """Take another store's."""
        self._local = local

    def find(self, identity: bytes) -> Calibration | None:
        """See `CalibrationSource`; knows what was fetched, too."""
        with self._lock:
            found = self._fetched.get(identity)
        if found is not None or identity == NO_CALIBRATION:
            return found
        if self._local is None:
            raise CorruptRecordError(f"calibration {identity.hex()} is not here")
        return self._local.find(identity)

    def of_model(self, spec: ModelSpec) -> Decision | None:
        """See `CalibrationSource`."""
        return None if self._local is None else self._local.of_model(spec)

    def bring(self, lane: Lane, identity: bytes, spec: ModelSpec, deadline_s: float) -> Calibration | None:
        """Return an object, fetched if need be; what could not be fetched is not tried again for five seconds.

        Args:
            lane: talks to the server.
            identity: the object's id, as records name it.
            spec: the model it must be of: what is larger than one of that model can be is not fetched.
            deadline_s: see `fetch_object`.

        Raises:
            CorruptRecordError: it is nowhere, or what the server has is another one.
            SpecMismatchError: it is of a model of another shape.
            UnsupportedFormatError: it is in a newer format.
            StoreIOError: the server failed.
        """
        try:
            return self.find(identity)
        except CorruptRecordError:
            with self._lock:
                failed_s, failure = self._failed.get(identity, (-_RETRY_S, None))
            if failure is not None and time.monotonic() - failed_s < _RETRY_S:
                raise type(failure)(str(failure)) from None
        try:
            found = self._fetch(lane, identity, spec, deadline_s)
        except KVStoreError as error:
            with self._lock:
                _keep(self._failed, identity, (time.monotonic(), error))
            raise
        with self._lock:
            _keep(self._fetched, identity, found)
        return found

    def send(self, lane: Lane, identity: bytes, deadline_s: float) -> None:
        """Make sure that the server has an object.

        Raises:
            CorruptRecordError: it is not here.
            CapacityError: the server is full.
            StoreIOError: the server failed.
        """
        found = self.find(identity)
        # Asked every time: a server forgets what it likes.
        if found is not None and not has_object(lane, self._namespace, _key(identity), deadline_s):
            send_object(lane, self._namespace, _key(identity), found.data, deadline_s)

    def _fetch(self, lane: Lane, identity: bytes, spec: ModelSpec, deadline_s: float) -> Calibration:
        data = fetch_object(lane, self._namespace, _key(identity), deadline_s, most_nbytes(spec))
        if data is None:
            raise CorruptRecordError(f"calibration {identity.hex()} is neither here nor on the server")
        found = Calibration(data)
        if found.id != identity:
            raise CorruptRecordError(f"calibration {identity.hex()}: the server has another under that name")
        found.check_spec(spec)
        return found


def most_nbytes(spec: ModelSpec) -> int:
    """Most bytes that a calibration of a model takes (csrc/codec/FORMAT.md section 8)."""
    nbytes = 32
    for dim in (spec.key_dim, spec.value_dim):
        nbytes += spec.num_layers * (2 * spec.kv_heads + 6 * spec.kv_heads * dim + 3)
    if can_have_bases(spec):
        # A group's vectors are a matrix of at most MAX_CHANNELS rows, and all groups together have these columns.
        channels = spec.num_layers * spec.kv_heads * (spec.key_dim + spec.value_dim)
        nbytes += 4 + channels * (2 * MAX_CHANNELS + 6) + 16 * spec.num_layers
    return nbytes


def _keep(known: OrderedDict[bytes, Value], identity: bytes, value: Value) -> None:
    """Remember something of an object, and forget the oldest of many."""
    known[identity] = value
    known.move_to_end(identity)
    if len(known) > _MAX_KNOWN:
        known.popitem(last=False)


def _key(identity: bytes) -> bytes:
    return object_key("calibration", identity)
