# SPDX-License-Identifier: Apache-2.0
"""Calibrations that lossy records need: sent along with the first record that names one, fetched when one is met."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from kvstore.calibration import CALIBRATION_ID_NBYTES, Calibration
from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError
from kvstore.remote.envelope import Namespace
from kvstore.remote.lane import Lane
from kvstore.remote.objects import fetch_object, has_object, object_key, send_object
from kvstore.spec import ModelSpec
from kvstore.tiers.codec_shelf import CalibrationSource

NO_CALIBRATION = bytes(CALIBRATION_ID_NBYTES)
_MAX_KNOWN = 64


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

    def bring(self, lane: Lane, identity: bytes, deadline_s: float) -> Calibration | None:
        """Return an object, fetched if need be.

        Raises:
            CorruptRecordError: it is nowhere, or what the server has is another one.
            UnsupportedFormatError: it is in a newer format.
            StoreIOError: the server failed.
        """
        try:
            return self.find(identity)
        except CorruptRecordError:
            data = fetch_object(lane, self._namespace, _key(identity), deadline_s)
        if data is None:
            raise CorruptRecordError(f"calibration {identity.hex()} is neither here nor on the server")
        found = Calibration(data)
        if found.id != identity:
            raise CorruptRecordError(f"calibration {identity.hex()}: the server has another under that name")
        with self._lock:
            self._fetched[identity] = found
            if len(self._fetched) > _MAX_KNOWN:
                self._fetched.popitem(last=False)
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


def _key(identity: bytes) -> bytes:
    return object_key("calibration", identity)
