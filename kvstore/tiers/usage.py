# SPDX-License-Identifier: Apache-2.0
"""Gathers the counters of all tiers into one snapshot."""

from __future__ import annotations

from dataclasses import replace

from kvstore.stats import StoreStats, TierStats
from kvstore.tiers.base import Tier
from kvstore.tiers.catalogue import Table
from kvstore.tiers.data_path import DataPath
from kvstore.tiers.disk import DiskTier


def collect_stats(disk: DiskTier, data: DataPath | None) -> StoreStats:
    """Take a snapshot; the parts are read one after another, not at one instant."""
    with disk.catalogue.read() as view:
        # Bodies of objects are among the blocks, and have no directory.
        num_blocks, num_streams = view.count(Table.DIRECTORIES), view.count(Table.STREAMS)
        num_bodies = max(0, view.count(Table.BLOCKS) - num_blocks)
    host = TierStats()
    durations = {(Tier.DISK.value, name): found for name, found in disk.meter.durations().items()}
    host_slots = host_slots_used = queued_blocks = 0
    if data is not None:
        host = replace(
            data.fetcher.host_meter.snapshot(),
            evicted_blocks=data.host.num_evicted,
            prefetch_hits=data.host.num_prefetch_hits,
            prefetch_wasted=data.host.num_prefetch_wasted,
        )
        host_slots, host_slots_used = data.host.num_slots, data.host.num_used
        queued_blocks = data.write.writer.num_queued if data.write is not None else 0
    return StoreStats(
        host=host,
        disk=disk.meter.snapshot(),
        usage=disk.usage(),
        num_blocks=num_blocks,
        num_streams=num_streams,
        num_objects=num_bodies,
        host_slots=host_slots,
        host_slots_used=host_slots_used,
        queued_blocks=queued_blocks,
        durations=durations,
        remote=None if data is None or data.backing is None else data.backing.stats(),
    )
