# SPDX-License-Identifier: Apache-2.0
"""What a fetch is asked for, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kvstore.spec import BlockKey
from kvstore.tiers.base import Outcome, Tier
from kvstore.tiers.eviction.partitions import NOBODY


class FetchRequest(NamedTuple):
    """One block to be brought.

    Args:
        key: the block.
        slot: [slot_nbytes] uint8 CPU, contiguous; where it goes.
        layers: layers to bring, a range with step 1; None for all. Other layers of the slot stay as they are.
        owner: stream whose share of the host tier a copy is counted to.
    """

    key: BlockKey
    slot: Tensor
    layers: range | None = None
    owner: str = NOBODY


@dataclass(slots=True)
class FetchReport:
    """What became of a batch.

    Args:
        outcomes: one per request, in order.
        bytes_read: bytes copied from the host tier and bytes read from disk, padding and merged gaps included.
        load_s: wall seconds of the whole batch.
        decode_s: seconds of checking and decoding, summed over threads.
        reasons: why an item is damaged or its tier unavailable, by its position in the batch.
    """

    outcomes: list[Outcome]
    bytes_read: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys((Tier.HOST, Tier.DISK, Tier.REMOTE), 0))
    load_s: float = 0.0
    decode_s: float = 0.0
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, other: FetchReport) -> None:
        """Add what another part of the same batch cost; outcomes stay."""
        for tier, nbytes in other.bytes_read.items():
            self.bytes_read[tier] += nbytes
        self.load_s += other.load_s
        self.decode_s += other.decode_s
        self.reasons.update(other.reasons)
