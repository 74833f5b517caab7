# SPDX-License-Identifier: Apache-2.0
"""Words that all tiers share: the tiers' names, the outcome of a look-up, and a place on disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """A medium that holds blocks, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Outcome(StrEnum):
    """What became of one block of a batch.

    `HOST` and `DISK` say which tier served it. After `MISS` and `DAMAGED` the destination holds undefined bytes.
    """

    HOST = "host"
    DISK = "disk"
    MISS = "miss"
    DAMAGED = "damaged"

    @property
    def is_hit(self) -> bool:
        """True when the destination holds the block."""
        return self in (Outcome.HOST, Outcome.DISK)


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A page-aligned byte range of an extent file; sorts in disk order."""

    file_id: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """First byte behind the range."""
        return self.offset + self.nbytes
