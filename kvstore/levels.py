# SPDX-License-Identifier: Apache-2.0
"""Which form of each block to bring when time is short: least lossy in time, or computed again. Decides only.

After the streaming adaptation of CacheGen (arXiv:2310.07240): before every block, what is left is planned anew with the
bandwidth of the last transfers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.errors import ConfigError

_MAX_TRANSFERS = 4


@dataclass(frozen=True, slots=True)
class Option:
    """One way to have a block.

    Args:
        name: a profile, or what else the caller calls it.
        loss: what it costs in quality; 0 is exact. Any measure in which more is worse, e.g. the KL divergence that a
            calibration measured.
        nbytes: bytes to transfer.
        work_s: seconds of everything that no bandwidth shortens: decoding, or prefill.

    Raises:
        ConfigError: a number is negative or not a number.
    """

    name: str
    loss: float
    nbytes: int
    work_s: float

    def __post_init__(self) -> None:
        if not (self.loss >= 0 and self.nbytes >= 0 and self.work_s >= 0):
            raise ConfigError(f"option {self.name}: loss {self.loss}, {self.nbytes} bytes, {self.work_s} s of work")

    @staticmethod
    def recompute(prefill_s: float) -> Option:
        """Compute the block again: exact, nothing to transfer."""
        return Option("recompute", 0.0, 0, prefill_s)

    def seconds(self, bandwidth: float) -> float:
        """Expected time at `bandwidth`, bytes per second."""
        return self.work_s if self.nbytes == 0 else self.nbytes / bandwidth + self.work_s


class Bandwidth:
    """Bytes per second to expect of the next transfer.

    The rate of the last transfers together or of the very last one, whichever is lower: a fall is believed at once, a
    rise when it lasts.

    Args:
        prior: what to expect before anything was measured, above 0.
        memory_s: a transfer that ended longer ago says nothing: after an outage in which nothing was transferred, the
            prior is tried again.

    Raises:
        ConfigError: a number is not positive.
    """

    def __init__(self, prior: float, memory_s: float) -> None:
        if not (0 < prior < math.inf and memory_s > 0):
            raise ConfigError(f"a prior of {prior} bytes/s and a memory of {memory_s} s; both must be positive")
        self._prior = prior
        self._memory_s = memory_s
        self._transfers: deque[tuple[float, int, float]] = deque(maxlen=_MAX_TRANSFERS)

    def note(self, nbytes: int, seconds: float, now_s: float) -> None:
        """Note a transfer that has just ended; one that took no measurable time says nothing."""
        if nbytes > 0 and seconds > 0:
            self._transfers.append((now_s, nbytes, seconds))

    def expected(self, now_s: float) -> float:
        """Bytes per second; `now_s` is a time of the clock that `note` was given."""
        recent = [(nbytes, s) for ended_s, nbytes, s in self._transfers if now_s - ended_s <= self._memory_s]
        if not recent:
            return self._prior
        last_nbytes, last_s = recent[-1]
        return min(last_nbytes / last_s, sum(nbytes for nbytes, _ in recent) / sum(s for _, s in recent))


def plan(blocks: Sequence[Sequence[Option]], bandwidth: float, left_s: float) -> list[Option]:
    """Choose an option for every block that is still to come; call again before each block.

    Finds the least loss that, allowed for every block, lets all of them arrive in time, one after the other; each block
    then takes its fastest option within that loss. So a stored block that takes longer than computing it again is
    declined, and where nothing is in time every block takes its fastest option.

    Args:
        blocks: per block its options, at least one.
        bandwidth: bytes per second to expect, above 0.
        left_s: seconds until the deadline; may be infinite, and negative when it has passed.

    Returns:
        One option per block.

    Raises:
        ConfigError: a block without options, or `bandwidth` is not positive.
    """
    if not bandwidth > 0:
        raise ConfigError(f"a bandwidth of {bandwidth} bytes/s; it must be positive")
    if not all(blocks):
        raise ConfigError("a block without options; at least recomputing it is one")
    chosen: list[Option] = []
    for loss in sorted({option.loss for options in blocks for option in options}):
        chosen = [_fastest(options, loss, bandwidth) for options in blocks]
        if sum(option.seconds(bandwidth) for option in chosen) <= left_s:
            break
    return chosen


def break_even_bandwidth(raw_nbytes: int, record_nbytes: int, codec_s: float) -> float:
    """Bandwidth below which coding a block pays: bytes saved per second of codec work.

    Args:
        raw_nbytes: bytes of the block as it is.
        record_nbytes: bytes as coded.
        codec_s: seconds of encoding and decoding it; of decoding alone for a block that is stored already.

    Returns:
        Bytes per second; 0 when nothing is saved, infinite when the codec takes no time.
    """
    saved_nbytes = raw_nbytes - record_nbytes
    if saved_nbytes <= 0:
        return 0.0
    return saved_nbytes / codec_s if codec_s > 0 else math.inf


def _fastest(options: Sequence[Option], loss: float, bandwidth: float) -> Option:
    """The fastest option within a loss, of equally fast ones the least lossy; else the least lossy there is."""
    allowed = [option for option in options if option.loss <= loss]
    if not allowed:
        return min(options, key=lambda option: (option.loss, option.seconds(bandwidth)))
    return min(allowed, key=lambda option: (option.seconds(bandwidth), option.loss))
