# SPDX-License-Identifier: Apache-2.0
"""Exchanges that may take long, one after another: what pushing and pulling a stream is made of."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.calibration import Calibration
from kvstore.layout import BlockLayout
from kvstore.remote.calibrations import RemoteCalibrations
from kvstore.remote.envelope import Kind, Namespace
from kvstore.remote.objects import fetch_object, has_object, object_key, send_object
from kvstore.remote.records import fetch_records, send_records
from kvstore.remote.server import RemoteServer
from kvstore.spec import BlockKey, ModelSpec
from kvstore.tiers.base import Outcome
from kvstore.tiers.codec_shelf import CalibrationSource

_EXCHANGE_S = 30.0
_CALL_S = 300.0
_MAX_PAGE_NBYTES = 64 << 20
_MAX_HEAD_NBYTES = 16 << 20


class Messenger:
    """Talks to a server about one stream. All methods raise `StoreIOError` when the server fails.

    Args:
        server: the server.
        calibrations: of the store at this end, if there is one.
    """

    def __init__(self, server: RemoteServer, calibrations: CalibrationSource | None) -> None:
        self._server = server
        self._calibrations = RemoteCalibrations(server.namespace, calibrations)

    def space(self, layout: BlockLayout) -> Namespace:
        """Namespace of a model's blocks."""
        return Namespace(self._server.namespace.name, layout.spec.fingerprint)

    def missing(self, space: Namespace, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Those blocks that the server lacks."""
        present = self._server.ask_exists([space.key(Kind.BLOCK, key) for key in keys], _EXCHANGE_S)
        return [key for key, is_there in zip(keys, present, strict=True) if not is_there]

    def send_records(self, space: Namespace, batch: Sequence[tuple[BlockKey, bytes]]) -> list[Outcome]:
        """See `records.send_records`."""
        return self._server.lanes.call(lambda lane: send_records(lane, space, batch, _EXCHANGE_S)[0], _CALL_S)

    def fetch_records(self, space: Namespace, keys: Sequence[BlockKey], room_nbytes: int) -> list[bytes | None]:
        """See `records.fetch_records`."""
        return self._server.lanes.call(lambda lane: fetch_records(lane, space, keys, room_nbytes, _EXCHANGE_S), _CALL_S)

    def forget_records(self, space: Namespace, keys: Sequence[BlockKey]) -> None:
        """Make the server forget blocks, so that the next push sends them again."""
        self._server.ask_remove([space.key(Kind.BLOCK, key) for key in keys], _EXCHANGE_S)

    def send_calibration(self, identity: bytes) -> None:
        """See `RemoteCalibrations.send`."""
        self._server.lanes.call(lambda lane: self._calibrations.send(lane, identity, _EXCHANGE_S), _CALL_S)

    def bring_calibration(self, identity: bytes, spec: ModelSpec) -> Calibration | None:
        """See `RemoteCalibrations.bring`."""
        return self._server.lanes.call(
            lambda lane: self._calibrations.bring(lane, identity, spec, _EXCHANGE_S), _CALL_S
        )

    def send_page(self, name: bytes, data: bytes) -> None:
        """Store a page under the name of its content, unless it is there."""
        key, namespace = object_key("page", name), self._server.namespace
        if not self._server.lanes.call(lambda lane: has_object(lane, namespace, key, _EXCHANGE_S), _CALL_S):
            self._send(key, data, _MAX_PAGE_NBYTES)

    def fetch_page(self, name: bytes) -> bytes | None:
        """Fetch a page; its content is still to be compared with its name."""
        return self._fetch(object_key("page", name), _MAX_PAGE_NBYTES)

    def send_head(self, stream: str, data: bytes) -> None:
        """Store what pullers of a stream read first, in place of an older one."""
        self._send(object_key("stream", stream.encode()), data, _MAX_HEAD_NBYTES)

    def fetch_head(self, stream: str) -> bytes | None:
        """Fetch what pullers of a stream read first."""
        return self._fetch(object_key("stream", stream.encode()), _MAX_HEAD_NBYTES)

    def _send(self, key: bytes, data: bytes, max_nbytes: int) -> None:
        namespace = self._server.namespace
        self._server.lanes.call(lambda lane: send_object(lane, namespace, key, data, _EXCHANGE_S, max_nbytes), _CALL_S)

    def _fetch(self, key: bytes, max_nbytes: int) -> bytes | None:
        namespace = self._server.namespace
        return self._server.lanes.call(
            lambda lane: fetch_object(lane, namespace, key, _EXCHANGE_S, max_nbytes), _CALL_S
        )
