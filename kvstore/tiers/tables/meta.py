# SPDX-License-Identifier: Apache-2.0
"""Table `meta`: format version, when the store was made, and the counters that must never repeat."""

from __future__ import annotations

import struct
from collections.abc import Callable

from kvstore.errors import CorruptRecordError, StoreNotFoundError, UnsupportedFormatError
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.tables.folders import new_folders, write_folders

FORMAT_MAJOR = 1
FORMAT_MINOR = 2

_FORMAT_KEY = b"format"
_EPOCH_KEY = b"epoch"
_STREAM_ID_KEY = b"next stream id"
_FORMAT = struct.Struct("<4sHHd")  # magic, major, minor, seconds since 1970 at creation
_FORMAT_MAGIC = b"KVXS"
_COUNTER = struct.Struct("<Q")
_EPOCH_SHIFT = 32


def check_format(view: ReadView) -> None:
    """Refuse a catalogue that this program cannot read.

    Raises:
        StoreNotFoundError: the catalogue was never finished.
        CorruptRecordError: the version is unreadable.
        UnsupportedFormatError: the major version is newer.
    """
    value = view.get(Table.META, _FORMAT_KEY)
    if value is None:
        raise StoreNotFoundError("the catalogue holds no store: its creation never finished; open it for writing")
    if len(value) != _FORMAT.size:
        raise CorruptRecordError(f"format version: {len(value)} bytes, {_FORMAT.size} wanted")
    magic, major, minor, _ = _FORMAT.unpack(value)
    if magic != _FORMAT_MAGIC:
        raise CorruptRecordError(f"format version: magic is {magic!r}, not {_FORMAT_MAGIC!r}")
    if major > FORMAT_MAJOR:
        raise UnsupportedFormatError(
            f"the store has format {major}.{minor}; this program reads up to {FORMAT_MAJOR}.x: upgrade kvstore"
        )


def begin_epoch(view: WriteView, now_unix_s: float) -> int:
    """Write the format version of a new store, bring an older one up to date, and count one more writer.

    Returns:
        The first number of this writer's range: generations and stamps drawn from it are unique in the life of the
        store even when an earlier writer died before it committed the ones it had used.

    Raises:
        CorruptRecordError, UnsupportedFormatError: see `check_format`.
        UnsupportedFormatError: the minor version is newer: a writer would take its values for damaged.
    """
    if view.get(Table.META, _FORMAT_KEY) is None:
        write_folders(view, new_folders())
        view.put(Table.META, _FORMAT_KEY, _FORMAT.pack(_FORMAT_MAGIC, FORMAT_MAJOR, FORMAT_MINOR, now_unix_s))
    check_format(view)
    magic, major, minor, created_unix_s = _FORMAT.unpack(view.get(Table.META, _FORMAT_KEY) or b"")
    if minor > FORMAT_MINOR:
        raise UnsupportedFormatError(
            f"the store has format {major}.{minor}; this program writes up to {FORMAT_MAJOR}.{FORMAT_MINOR}: "
            "upgrade kvstore, or open it for reading"
        )
    for step in _STEPS[minor:]:
        step(view)
    if minor < FORMAT_MINOR:
        view.put(Table.META, _FORMAT_KEY, _FORMAT.pack(magic, major, FORMAT_MINOR, created_unix_s))
    return _next(view, _EPOCH_KEY) << _EPOCH_SHIFT


def _to_1_1(view: WriteView) -> None:
    """1.1 knows several folders of extents, and gives the store an id that marks them."""
    write_folders(view, new_folders())


def _to_1_2(view: WriteView) -> None:
    """1.2 knows objects of streams; a store without any is the same."""


_STEPS: tuple[Callable[[WriteView], None], ...] = (_to_1_1, _to_1_2)
"""Step i takes a store from minor version i to the next one, in the transaction that lets the first new writer in."""


def next_stream_id(view: WriteView) -> int:
    """Draw a stream id; ids are never used twice, so a removed stream's leftovers cannot be mistaken."""
    return _next(view, _STREAM_ID_KEY)


def ensure_stream_counter(view: WriteView, least: int) -> bool:
    """Set the counter of streams to `least` where it is damaged or lower; returns whether it was."""
    value = view.get(Table.META, _STREAM_ID_KEY)
    number = 0 if value is None else _COUNTER.unpack(value)[0] if len(value) == _COUNTER.size else -1
    if number < least:
        view.put(Table.META, _STREAM_ID_KEY, _COUNTER.pack(least))
    return bool(number < least)


def _next(view: WriteView, key: bytes) -> int:
    value = view.get(Table.META, key)
    if value is not None and len(value) != _COUNTER.size:
        raise CorruptRecordError(f"counter {key.decode()}: {len(value)} bytes, {_COUNTER.size} wanted")
    number: int = 1 if value is None else _COUNTER.unpack(value)[0] + 1
    view.put(Table.META, key, _COUNTER.pack(number))
    return number
