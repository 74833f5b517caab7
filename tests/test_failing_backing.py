# SPDX-License-Identifier: Apache-2.0
"""What stands behind a store and fails as nothing should: prefetching goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from kvstore.spec import BlockKey
from kvstore.stats import BreakerState, RemoteStats, TierStats
from kvstore.store import Access, Outcome, Store
from kvstore.tiers.codec_shelf import CalibrationSource
from tests.store_blocks import LAYOUT, block_key, make_slot


class _OutOfMemory:
    """Something behind the disk that fails as nothing should."""

    def __init__(self) -> None:
        self.layout = LAYOUT

    def bring(self, keys: Sequence[BlockKey], slots: Sequence[Tensor], left_s: float | None) -> list[Outcome]:
        raise MemoryError("no room for what comes")

    def offer(self, key: BlockKey, record: memoryview) -> None:
        pass

    def stats(self) -> RemoteStats:
        return RemoteStats(TierStats(), 0, 0, 0, BreakerState.CLOSED, 0, 0, 0, 0)

    def use_calibrations(self, source: CalibrationSource) -> None:
        pass


def test_a_unit_that_fails_does_not_end_prefetching(tmp_path: Path) -> None:
    host_nbytes = 8 * LAYOUT.slot_nbytes
    with Store.open(
        tmp_path, access=Access.WRITE, layout=LAYOUT, host_nbytes=host_nbytes, remote=_OutOfMemory()
    ) as store:
        store.put([block_key(0), block_key(1)], [make_slot(0), make_slot(1)], [40] * 2)
        for turn in range(2):
            assert store.prefetch([block_key(90 + turn)]).wait(60) == [Outcome.UNAVAILABLE]
            assert store.prefetch([block_key(turn)]).wait(60) == [Outcome.DISK]
        assert store.stats().host_slots_used == 2
