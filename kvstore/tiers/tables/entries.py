# SPDX-License-Identifier: Apache-2.0
"""Many entries of a stream at once: packed rows and columns, so that a long stream costs bytes and not objects."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.tiers.tables.records import ENTRY_NBYTES, VALUE_VERSION, Entry, pack_entry, unpack_entry

_CHUNK_ROWS = 4096
_ROW = np.dtype(
    [
        ("version", "u1"),
        ("zeros", "u1", 3),
        ("num_tokens", "<u4"),
        ("key", "V32"),
        ("first_token", "<u8"),
        ("start_s", "<f8"),
        ("end_s", "<f8"),
        ("group", "<i8"),
    ]
)
Rows = npt.NDArray[np.void]
Numbers = npt.NDArray[np.int64]


class Entries(Sequence[Entry]):
    """Entries of a stream from the first one on, or some of them. Immutable; parts, and what is longer, share memory.

    Each takes its 72 bytes as in the catalogue and 16 more in columns; it becomes an `Entry` when it is asked for.
    """

    __slots__ = ("_numbers", "_table")

    def __init__(self) -> None:
        self._table = _Table()
        self._numbers = range(0)

    @staticmethod
    def of(entries: Iterable[Entry]) -> Entries:
        """Entries that are numbered from 0 on; as they are if they are `Entries` already."""
        return entries if isinstance(entries, Entries) else Entries().followed_by(entries)

    def followed_by(self, entries: Iterable[Entry]) -> Entries:
        """These, from the stream's first one on, and those that come next in it."""
        return self.followed_by_packed(b"".join(map(pack_entry, entries)))

    def followed_by_packed(self, packed: bytes) -> Entries:
        """Like `followed_by`, of values of table `entries`, one behind the other.

        Raises:
            CorruptRecordError, UnsupportedFormatError: one of them is not what `unpack_entry` takes.
        """
        assert self._numbers == range(len(self)), "a part is followed by what it was cut from"
        rows = _rows_of(packed, len(self))
        found = Entries()
        found._table = self._table.with_rows(len(self), rows)
        found._numbers = range(len(self) + rows.shape[0])
        return found

    @property
    def first_tokens(self) -> Tensor:
        """Number of the first token of each: `[num_entries]` int64; nobody writes to it."""
        return torch.from_numpy(self._table.firsts.used)[self._places]

    @property
    def sizes(self) -> Tensor:
        """Tokens of each: `[num_entries]` int64; nobody writes to it."""
        return torch.from_numpy(self._table.sizes.used)[self._places]

    @property
    def end_token(self) -> int:
        """Number behind the last token of the last one; 0 where there is none."""
        return int(self.first_tokens[-1] + self.sizes[-1]) if len(self) else 0

    @property
    def _places(self) -> slice:
        return slice(self._numbers.start, self._numbers.stop, self._numbers.step)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Entries: ...
    def __getitem__(self, index: int | slice) -> Entry | Entries:
        if isinstance(index, int):
            return self._table.entry(self._numbers[index])
        part = Entries()
        part._table, part._numbers = self._table, self._numbers[index]
        return part

    def __iter__(self) -> Iterator[Entry]:
        return map(self._table.entry, self._numbers)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Entries) and self._table is other._table:
            return self._numbers == other._numbers
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} entries up to token {self.end_token}>"


class _Table:
    """Rows that are only ever added to; what was added stays."""

    def __init__(self) -> None:
        self.chunks: list[Rows] = []
        self.firsts = _Column()
        self.sizes = _Column()
        self.count = 0
        self._lock = threading.Lock()

    def entry(self, number: int) -> Entry:
        chunk, row = divmod(number, _CHUNK_ROWS)
        return unpack_entry(number, self.chunks[chunk][row].tobytes())

    def with_rows(self, first: int, rows: Rows) -> _Table:
        """A table whose rows from number `first` on begin with these: this one, unless others are there."""
        with self._lock:
            known = min(self.count - first, len(rows))
            if self._has(first, rows[:known]):
                self._add(rows[known:])
                return self
            other = _Table()
            whole = first // _CHUNK_ROWS
            other.chunks = self.chunks[:whole]  # full ones do not change
            other.count = whole * _CHUNK_ROWS
            other.firsts.add(self.firsts.used[: other.count])
            other.sizes.add(self.sizes.used[: other.count])
            if first > other.count:
                other._add(self.chunks[whole][: first - other.count])
        other._add(rows)
        return other

    def _has(self, first: int, rows: Rows) -> bool:
        while len(rows):
            chunk, row = divmod(first, _CHUNK_ROWS)
            here = self.chunks[chunk][row : row + len(rows)]
            if here.tobytes() != rows[: len(here)].tobytes():
                return False
            first, rows = first + len(here), rows[len(here) :]
        return True

    def _add(self, rows: Rows) -> None:
        self.firsts.add(rows["first_token"].astype(np.int64))
        self.sizes.add(rows["num_tokens"].astype(np.int64))
        while len(rows):
            row = self.count % _CHUNK_ROWS
            if row == 0:
                self.chunks.append(np.empty(_CHUNK_ROWS, dtype=_ROW))
            here = rows[: _CHUNK_ROWS - row]
            self.chunks[-1][row : row + len(here)] = here
            self.count += len(here)
            rows = rows[len(here) :]


class _Column:
    """Numbers in memory that doubles as they grow; what was handed out of it stays as it was."""

    def __init__(self) -> None:
        self._buffer: Numbers = np.empty(0, dtype=np.int64)
        self._count = 0

    @property
    def used(self) -> Numbers:
        return self._buffer[: self._count]

    def add(self, numbers: Numbers) -> None:
        needed = self._count + len(numbers)
        if needed > len(self._buffer):
            grown = np.empty(max(needed, 2 * len(self._buffer)), dtype=np.int64)
            grown[: self._count] = self.used
            self._buffer = grown
        self._buffer[self._count : needed] = numbers
        self._count = needed


def _rows_of(packed: bytes, first: int) -> Rows:
    """Packed entries as rows; the first one that `unpack_entry` does not take raises its error."""
    rows = np.frombuffer(packed, dtype=_ROW, count=len(packed) // ENTRY_NBYTES)
    is_sound = (rows["version"] == VALUE_VERSION) & np.isfinite(rows["start_s"]) & np.isfinite(rows["end_s"])
    for number in (~is_sound).nonzero()[0].tolist():
        unpack_entry(first + number, rows[number].tobytes())
    if rest := packed[rows.nbytes :]:
        unpack_entry(first + len(rows), rest)
    return rows
