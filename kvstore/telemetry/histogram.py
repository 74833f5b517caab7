# SPDX-License-Identifier: Apache-2.0
"""How long operations took, in buckets of powers of two: enough to tell a slow disk from a slow tail."""

from __future__ import annotations

from dataclasses import dataclass

NUM_BUCKETS = 30
_FIRST_BOUND_S = 1e-6


def bound_s(bucket: int) -> float:
    """Longest duration that a bucket counts, in seconds: 1 us, 2 us, ... 537 s; the last one also counts the rest."""
    return _FIRST_BOUND_S * float(1 << bucket)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations of operations so far; immutable, so a snapshot costs nothing.

    Args:
        counts: operations per bucket, `NUM_BUCKETS` of them.
        total_s: sum of the durations.
    """

    counts: tuple[int, ...] = (0,) * NUM_BUCKETS
    total_s: float = 0.0

    @property
    def count(self) -> int:
        """Operations."""
        return sum(self.counts)

    def with_one(self, seconds: float) -> Histogram:
        """Return the histogram with one more duration."""
        bucket = min(max(int(seconds / _FIRST_BOUND_S), 0).bit_length(), NUM_BUCKETS - 1)
        counts = (*self.counts[:bucket], self.counts[bucket] + 1, *self.counts[bucket + 1 :])
        return Histogram(counts, self.total_s + seconds)

    def since(self, earlier: Histogram) -> Histogram:
        """Return what came after an earlier snapshot."""
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Histogram(counts, self.total_s - earlier.total_s)

    def quantile_s(self, share: float) -> float:
        """Return a duration that at least `share` (0 to 1) of the operations stayed within; 0 without operations."""
        wanted, seen = share * self.count, 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return bound_s(bucket)
        return 0.0
