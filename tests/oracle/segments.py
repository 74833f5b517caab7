# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md sections 4.1 and 4.2: which elements a segment holds, in which order; and the sections of a plane."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import CorruptRecordError
from tests.oracle.rans import GROUP

Integers = NDArray[np.int64]


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Cut(NamedTuple):
    """How planes are cut into segments: most tokens and heads of one."""

    tokens: int
    heads: int


class Segment(NamedTuple):
    """Heads and coded tokens of a segment."""

    heads: slice
    tokens: slice


def segments(heads: int, coded_tokens: int, cut: Cut) -> list[Segment]:
    return [
        Segment(slice(h, min(h + cut.heads, heads)), slice(t, min(t + cut.tokens, coded_tokens)))
        for h in range(0, heads, cut.heads)
        for t in range(0, coded_tokens, cut.tokens)
    ]


def fits(coded_tokens: int, dim: int, cut: Cut) -> bool:
    """The bound of section 4.1."""
    return cut.heads * min(cut.tokens, coded_tokens) * padded(dim, GROUP) <= 65536


def writers_cut(heads: int, coded_tokens: int, dim: int, segment_tokens: int) -> Cut:
    """segment_heads as section 9 chooses it."""
    most = max(1, 32768 // (padded(dim, GROUP) * min(segment_tokens, coded_tokens)))
    groups = -(-heads // most)
    return Cut(segment_tokens, -(-heads // groups))


def rows_to_entries(values: Integers, null: int) -> Integers:
    """[heads, tokens, dim] -> entries in coding order: token, head, channel, with null entries from dim on."""
    heads, tokens, dim = values.shape
    out = np.full((tokens, heads, padded(dim, GROUP)), null, dtype=np.int64)
    out[:, :, :dim] = values.transpose(1, 0, 2)
    return out.reshape(-1)


def entries_to_rows(entries: Integers, heads: int, dim: int) -> Integers:
    """The inverse of rows_to_entries."""
    return entries.reshape(-1, heads, padded(dim, GROUP))[:, :, :dim].transpose(1, 0, 2)


def scales_to_entries(values: Integers, null: int) -> Integers:
    """[heads, tokens] -> entries in the order head, token, filled up to whole groups."""
    out = np.full(padded(values.size, GROUP), null, dtype=np.int64)
    out[: values.size] = values.reshape(-1)
    return out


class Sections:
    """Reads a plane's sections, each padded to a multiple of 4 bytes, and knows when they do not fill it."""

    def __init__(self, plane: bytes) -> None:
        self._plane = plane
        self._at = 0

    def peek(self, nbytes: int) -> bytes:
        """The first bytes of the next section, which stays the next.

        Raises:
            CorruptRecordError: the plane ends before they do.
        """
        if padded(nbytes, 4) > len(self._plane) - self._at:
            raise CorruptRecordError(f"a section of {nbytes} bytes passes the end of its plane")
        return self._plane[self._at : self._at + nbytes]

    def take(self, nbytes: int) -> bytes:
        """The next section without its padding.

        Raises:
            CorruptRecordError: the plane ends before it.
        """
        taken = self.peek(nbytes)
        self._at += padded(nbytes, 4)
        return taken

    def finish(self) -> None:
        """Refuse bytes that belong to no section.

        Raises:
            CorruptRecordError: there are some.
        """
        if self._at != len(self._plane):
            raise CorruptRecordError(f"{len(self._plane) - self._at} bytes follow the last section")


def section(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
