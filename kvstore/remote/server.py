# SPDX-License-Identifier: Apache-2.0
"""One namespace on one server, as everything here reaches it: threads, breaker, counters, and raw records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.errors import StoreIOError
from kvstore.remote.breaker import Breaker, BreakerConfig
from kvstore.remote.envelope import Kind, Namespace
from kvstore.remote.lane import LaneConfig
from kvstore.remote.lanes import Lanes
from kvstore.remote.transport import Transport


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """How a server is treated.

    Args:
        deadline_s: seconds that a call takes at most, unless it is given others.
        lanes: threads.
        breaker: when to leave the server alone.
    """

    deadline_s: float = 1.0
    lanes: LaneConfig = field(default_factory=LaneConfig)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)


class RemoteServer:
    """A server and a namespace on it. Thread-safe. Nothing is connected before the first call.

    Args:
        transport: how to reach it; closed with this.
        namespace: letters, digits, dots and dashes; two that differ share nothing.
        config: deadlines and thresholds.

    Raises:
        ConfigError: the namespace holds other signs.
    """

    def __init__(self, transport: Transport, namespace: str, config: RemoteConfig | None = None) -> None:
        self.namespace = Namespace(namespace)
        self.config = config or RemoteConfig()
        self.breaker = Breaker(self.config.breaker)
        self.lanes = Lanes(transport, self.breaker, self.config.lanes)
        self.place = f"{transport.place}/{namespace}"

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def is_reachable(self, timeout_s: float = 10.0) -> bool:
        """Ask the server for anything; the first call also connects, which may take longer than a deadline."""
        key = self.namespace.key(Kind.BLOCK, bytes(32))
        try:
            ask = self.lanes.call(
                lambda lane: lane.ask(lambda link, until_s: link.exists([key], until_s), timeout_s), timeout_s
            )
        except StoreIOError:
            return False
        return len(ask) == 1

    def ask_exists(self, keys: Sequence[str], timeout_s: float) -> list[bool]:
        """Say per key whether the server has a value; raises `StoreIOError`."""
        return self.lanes.call(
            lambda lane: lane.ask(lambda link, until_s: link.exists(keys, until_s), timeout_s), timeout_s
        )

    def ask_remove(self, keys: Sequence[str], timeout_s: float) -> list[bool]:
        """Forget values; raises `StoreIOError`."""
        return self.lanes.call(
            lambda lane: lane.ask(lambda link, until_s: link.remove(keys, until_s), timeout_s), timeout_s
        )

    def close(self) -> None:
        """Let what was submitted end, for as long as a call may take; then hang up. A second call does nothing."""
        self.lanes.close(self.config.deadline_s + self.config.lanes.deadline_s)
