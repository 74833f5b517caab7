# SPDX-License-Identifier: Apache-2.0
"""Words that all tiers share: the tiers' names, the outcome of a look-up, and a place on disk."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Tier(StrEnum):
    """A medium that holds blocks, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


class Outcome(StrEnum):
    """What became of one block of a batch.

    `HOST`, `DISK` and `REMOTE` say which tier served a read. After any other outcome of a read the destination holds
    undefined bytes. `STORED` is the good end of a write; `FULL` a write that found no room. `TIMED_OUT`, `CANCELLED`
    and `UNAVAILABLE` (the tier failed, or is bypassed since it kept failing) end reads and writes alike.
    """

    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"
    STORED = "stored"
    MISS = "miss"
    DAMAGED = "damaged"
    FULL = "full"
    TIMED_OUT = "timed out"
    CANCELLED = "cancelled"
    UNAVAILABLE = "unavailable"

    @property
    def is_hit(self) -> bool:
        """True when the destination of a read holds the block."""
        return self in (Outcome.HOST, Outcome.DISK, Outcome.REMOTE)


class Extent(NamedTuple):
    """A page-aligned byte range of an extent file; sorts in disk order."""

    file_id: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """First byte behind the range."""
        return self.offset + self.nbytes
