# SPDX-License-Identifier: Apache-2.0
"""What may stand behind a store: asked for blocks that the disk does not have, told of those that are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey
from kvstore.stats import RemoteStats
from kvstore.tiers.base import Outcome
from kvstore.tiers.codec_shelf import CalibrationSource


class Backing(Protocol):
    """A tier behind the disk, such as `kvstore.remote.tier.RemoteTier`. Best effort: nothing durable depends on it."""

    @property
    def layout(self) -> BlockLayout:
        """Layout of its slots."""
        ...

    def bring(self, keys: Sequence[BlockKey], slots: Sequence[Tensor], left_s: float | None) -> list[Outcome]:
        """Bring blocks into slots; ends within `left_s`, and within a time of its own that an engine can bear."""
        ...

    def offer(self, key: BlockKey, record: memoryview) -> None:
        """Take a copy of a record, or drop it; never waits."""
        ...

    def stats(self) -> RemoteStats:
        """Count what moved and what failed since it was opened."""
        ...

    def use_calibrations(self, source: CalibrationSource) -> None:
        """Learn where the calibrations are that offered records name."""
        ...
