# SPDX-License-Identifier: Apache-2.0
"""A store's counters as Prometheus metrics. The only importer of prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from kvstore.errors import BusyError
from kvstore.extras import missing_dependency
from kvstore.stats import BreakerState, RemoteStats, TierStats
from kvstore.store import Store
from kvstore.telemetry.histogram import NUM_BUCKETS, Histogram, bound_s

try:
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise missing_dependency("prometheus_client", "exporting metrics") from error

_LOOKUPS = {"hits": "hit", "misses": "miss", "damaged": "damaged", "unavailable": "unavailable"}
_BLOCKS = {
    "read_blocks": "read",
    "written_blocks": "write",
    "evicted_blocks": "evict",
    "shared_reads": "share",
    "prefetched_blocks": "prefetch",
    "prefetch_hits": "prefetch_hit",
    "prefetch_wasted": "prefetch_waste",
}
_BYTES = {"read_nbytes": "read", "written_nbytes": "write"}
_FAILURES = ("full", "timed_out", "unavailable")
_SECONDS = {"read_s": "read", "write_s": "write", "encode_s": "encode", "decode_s": "decode"}


class StoreCollector(Collector):
    """Reads `Store.stats()` whenever Prometheus asks; costs nothing in between.

    Args:
        store: an open store. Once it is closed, nothing is reported of it.
        name: value of the label `store`, which tells several stores of one process apart.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; kvstore_* counters never go down while the store is open."""
        try:
            stats = self._store.stats()
        except BusyError:  # closed, or another process's
            return
        tiers = {"host": stats.host, "disk": stats.disk}
        if stats.remote is not None:
            tiers["remote"] = stats.remote.tier
            yield from self._remote(stats.remote)
        yield self._counter("lookups", "Blocks looked up, by what was found.", tiers, _LOOKUPS, "outcome")
        yield self._counter("blocks", "Blocks moved.", tiers, _BLOCKS, "operation")
        yield self._counter("bytes", "Bytes moved.", tiers, _BYTES, "operation")
        yield self._counter("seconds", "Seconds of work, summed over threads.", tiers, _SECONDS, "operation")
        yield self._durations(stats.durations)
        for name, text, value in (
            ("queued_blocks", "Blocks that wait to be written.", stats.queued_blocks),
            ("host_slots", "Slots of the host tier.", stats.host_slots),
            ("host_slots_used", "Slots of the host tier that hold a block.", stats.host_slots_used),
            ("stored_blocks", "Blocks on disk.", stats.num_blocks),
            ("streams", "Streams on disk.", stats.num_streams),
            ("stored_objects", "Objects of streams on disk.", stats.num_objects),
            *((f"disk_{part}", "Bytes on disk.", nbytes) for part, nbytes in asdict(stats.usage).items()),
        ):
            gauge = GaugeMetricFamily(f"kvstore_{name}", text, labels=["store"])
            gauge.add_metric([self._name], value)
            yield gauge

    def _counter(
        self, name: str, text: str, tiers: dict[str, TierStats], fields: dict[str, str], label: str
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(f"kvstore_{name}", text, labels=["store", "tier", label])
        for tier, stats in tiers.items():
            for field, value in fields.items():
                family.add_metric([self._name, tier, value], getattr(stats, field))
        return family

    def _remote(self, remote: RemoteStats) -> Iterator[Metric]:
        text = "Blocks of calls that the server did not serve, reads and writes."
        failures = CounterMetricFamily("kvstore_remote_failures", text, labels=["store", "outcome"])
        for outcome in _FAILURES:
            failures.add_metric([self._name, outcome], getattr(remote, outcome))
        yield failures
        state = GaugeMetricFamily("kvstore_remote_breaker", "1 for the breaker's state.", labels=["store", "state"])
        for each in BreakerState:
            state.add_metric([self._name, each.value], remote.breaker is each)
        yield state
        for name, text, number in (
            ("breaker_opened", "How often the breaker has opened.", remote.breaker_opened),
            ("dropped_offers", "Written blocks that were not sent.", remote.dropped_offers),
        ):
            counter = CounterMetricFamily(f"kvstore_remote_{name}", text, labels=["store"])
            counter.add_metric([self._name], number)
            yield counter
        for name, text, number in (
            ("queued_offers", "Written blocks that wait to be sent.", remote.queued_offers),
            ("threads_left_behind", "Threads that hang in a call.", remote.threads_left_behind),
        ):
            gauge = GaugeMetricFamily(f"kvstore_remote_{name}", text, labels=["store"])
            gauge.add_metric([self._name], number)
            yield gauge

    def _durations(self, durations: dict[tuple[str, str], Histogram]) -> HistogramMetricFamily:
        text = "Seconds that batches took."
        family = HistogramMetricFamily("kvstore_batch_seconds", text, labels=["store", "tier", "operation"])
        for (tier, operation), histogram in durations.items():
            buckets, seen = [], 0
            for bucket, count in enumerate(histogram.counts):
                seen += count
                buckets.append((str(bound_s(bucket)) if bucket < NUM_BUCKETS - 1 else "+Inf", seen))
            family.add_metric([self._name, tier, operation], buckets, histogram.total_s)
        return family


def serve(store: Store, port: int, *, address: str = "127.0.0.1", name: str = "store") -> int:
    """Answer Prometheus over HTTP at `/metrics`, on a thread of its own, for as long as the process lives.

    Args:
        store: an open store.
        port: TCP port; 0 takes a free one.
        address: where to listen. Metrics are not secret, and not protected either.
        name: see `StoreCollector`.

    Returns:
        The port.

    Raises:
        OSError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(StoreCollector(store, name))
    server, _ = start_http_server(port, addr=address, registry=registry)
    return int(server.server_port)
