# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md section 4.3: rANS with 32 states and 16-bit words; one NumPy operation works on all lanes of a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import CorruptRecordError

LANES = 32
GROUP = 64
TOTAL = 1024
STATES_NBYTES = 4 * LANES
_LOWEST = np.uint64(1 << 16)

Integers = NDArray[np.int64]


class Tables:
    """Frequencies, starts and slots of some tables over one alphabet, with one more table: that of null entries.

    Args:
        lowest: the symbol of the first column.
        frequency: [tables, symbols], each row summing to 1024.
    """

    def __init__(self, lowest: int, frequency: Integers) -> None:
        null = np.zeros((1, frequency.shape[1]), dtype=np.int64)
        null[0, -lowest] = TOTAL
        self.lowest = lowest
        self.null = len(frequency)
        self.frequency = np.concatenate([frequency, null]).astype(np.uint64)
        self.start = np.cumsum(self.frequency, axis=1, dtype=np.uint64) - self.frequency
        columns = np.arange(frequency.shape[1])
        self.column = np.stack([np.repeat(columns, row.astype(np.int64)) for row in self.frequency])


def _steps(entries: Integers) -> Integers:
    """[entries] -> [steps, lanes]: step p of a group takes entry 2j + p in lane j."""
    return entries.reshape(-1, LANES, 2).transpose(0, 2, 1).reshape(-1, LANES)


def _entries(steps: Integers) -> Integers:
    return steps.reshape(-1, 2, LANES).transpose(0, 2, 1).reshape(-1)


def encode(tables: Tables, table: Integers, symbols: Integers) -> bytes:
    """States and words of a segment.

    Args:
        tables: the tables that `table` counts.
        table: [entries] which table codes each entry; entries are a multiple of 64.
        symbols: [entries], each of frequency 1 or more in its table.
    """
    x = np.full(LANES, _LOWEST)
    words = []
    for which, column in zip(_steps(table)[::-1], _steps(symbols - tables.lowest)[::-1], strict=True):
        f, c = tables.frequency[which, column], tables.start[which, column]
        assert (f > 0).all(), "a symbol outside its alphabet"
        full = x >= f << np.uint64(22)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x[full] >>= np.uint64(16)
        x = (x // f << np.uint64(10)) | (x % f + c)
    return x.astype("<u4").tobytes() + b"".join(word.tobytes() for word in reversed(words))


def decode(tables: Tables, table: Integers, stored: bytes) -> Integers:
    """Symbols [entries] of a segment; the inverse of `encode`.

    Raises:
        CorruptRecordError: a state starts below 2^16, or states or words do not come out even.
    """
    x = np.frombuffer(stored[:STATES_NBYTES], dtype="<u4").astype(np.uint64)
    words = np.frombuffer(stored[STATES_NBYTES:], dtype="<u2").astype(np.uint64)
    if (x < _LOWEST).any():
        raise CorruptRecordError("segment: a state starts below 2^16")
    symbols = np.zeros((len(table) // LANES, LANES), dtype=np.int64)
    read = 0
    for at, which in enumerate(_steps(table)):
        slot = x & np.uint64(TOTAL - 1)
        column = tables.column[which, slot.astype(np.int64)]
        x = tables.frequency[which, column] * (x >> np.uint64(10)) + slot - tables.start[which, column]
        low = x < _LOWEST
        count = int(low.sum())
        if count > len(words) - read:
            raise CorruptRecordError("segment: its words end early")
        x[low] = x[low] << np.uint64(16) | words[read : read + count]
        read += count
        symbols[at] = column + tables.lowest
    if (x != _LOWEST).any() or read != len(words):
        raise CorruptRecordError("segment: states or words do not come out even")
    return _entries(symbols)
