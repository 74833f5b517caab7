# SPDX-License-Identifier: Apache-2.0
"""Tables `blocks`, `directories`, `extents`, `lru`: what the disk tier holds, kept consistent in one transaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.policy import Candidate
from kvstore.spec import BlockKey
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.tables.records import (
    BlockRecord,
    check_key,
    is_extent,
    pack_block,
    pack_extent,
    pack_stamp,
    unpack_block,
    unpack_extent,
)


def find_block(view: ReadView, key: BlockKey) -> BlockRecord | None:
    """Look up one block.

    Raises:
        CorruptRecordError: its entry is damaged.
        UnsupportedFormatError: its entry is newer than this program.
    """
    value = view.get(Table.BLOCKS, key)
    return None if value is None else unpack_block(value)


def find_directory(view: ReadView, key: BlockKey) -> bytes | None:
    """Return the first bytes of the block's record: header and plane directory, unchecked."""
    return view.get(Table.DIRECTORIES, key)


def has_block(view: ReadView, key: BlockKey) -> bool:
    """True when the block is stored; does not read its record."""
    return view.get(Table.BLOCKS, key) is not None


def insert_block(view: WriteView, key: BlockKey, record: BlockRecord, directory: bytes) -> Extent | None:
    """Store where a freshly written block lies; a block of that key is replaced and keeps its references.

    Returns:
        The extent that the replaced block leaves, to be freed after the commit; None when the key is new.
    """
    old = find_block(view, key)
    if old is not None:
        _drop_extent(view, old)
        record = replace(record, references=old.references)
        _forget_stamp(view, old)
    view.put(Table.BLOCKS, key, pack_block(record))
    view.put(Table.DIRECTORIES, key, directory)
    view.put(Table.EXTENTS, *pack_extent(record.extent, key))
    if record.references == 0:
        view.put(Table.LRU, pack_stamp(record.stamp), key)
    return None if old is None else old.extent


def add_reference(view: WriteView, key: BlockKey) -> None:
    """Count one more stream entry that names the block; it can no longer be evicted.

    Raises:
        CorruptRecordError: the block is not there: the caller's transaction must not commit.
    """
    record = find_block(view, key)
    if record is None:
        raise CorruptRecordError(f"block {key.hex()[:16]} is referred to and not stored")
    _forget_stamp(view, record)
    view.put(Table.BLOCKS, key, pack_block(replace(record, references=record.references + 1)))


def set_references(view: WriteView, key: BlockKey, references: int) -> None:
    """Correct how many stream entries name a block; does nothing for a block that is not stored."""
    record = find_block(view, key)
    if record is None or record.references == references:
        return
    _forget_stamp(view, record)
    view.put(Table.BLOCKS, key, pack_block(replace(record, references=references)))
    if references == 0:
        view.put(Table.LRU, pack_stamp(record.stamp), key)


def drop_reference(view: WriteView, key: BlockKey) -> Extent | None:
    """Undo one `add_reference`; the last one removes the block and returns its extent, to be freed after the commit.

    A block that is gone already is no error: removing a damaged stream must succeed.
    """
    record = find_block(view, key)
    if record is None:
        return None
    if record.references > 1:
        view.put(Table.BLOCKS, key, pack_block(replace(record, references=record.references - 1)))
        return None
    return delete_block(view, key, record)


def delete_block(view: WriteView, key: BlockKey, record: BlockRecord) -> Extent:
    """Remove a block whose record has just been looked up; returns its extent, to be freed after the commit."""
    _forget_stamp(view, record)
    _drop_extent(view, record)
    view.delete(Table.BLOCKS, key)
    view.delete(Table.DIRECTORIES, key)
    return record.extent


def delete_unreferenced(view: WriteView, key: BlockKey) -> Extent | None:
    """Remove a block that no stream needs; returns its extent, or None when it stays or was not there."""
    record = find_block(view, key)
    if record is None or record.references > 0:
        return None
    return delete_block(view, key, record)


def touch(view: WriteView, key: BlockKey, stamp: int) -> None:
    """Mark a block as used now; does nothing for a block that is gone or that a stream refers to."""
    record = find_block(view, key)
    if record is None or record.references > 0:
        return
    _forget_stamp(view, record)
    view.put(Table.BLOCKS, key, pack_block(replace(record, stamp=stamp)))
    view.put(Table.LRU, pack_stamp(stamp), key)


def oldest_first(view: ReadView, records: dict[BlockKey, BlockRecord]) -> Iterator[Candidate]:
    """Yield the blocks that may be evicted, least recently used first; damaged entries are passed over.

    Args:
        view: the transaction.
        records: gains the record of every block that was yielded.
    """
    for _, value in view.scan(Table.LRU):
        with suppress(CorruptRecordError, UnsupportedFormatError):
            key = check_key(value)
            record = find_block(view, key)
            if record is not None and record.references == 0:
                records[key] = record
                yield Candidate(key, record.extent.nbytes)


def allocated_extents(view: ReadView, start: bytes = b"") -> Iterator[tuple[Extent, BlockKey]]:
    """Yield every allocated extent and its block, in disk order."""
    for key, value in view.scan(Table.EXTENTS, start=start):
        yield unpack_extent(key, value)


def taken_extents(view: ReadView) -> Iterator[Extent]:
    """Yield what must not be written to, in disk order: all that either table says, where they contradict each other.

    A damaged row of one table must not make room of what the other one knows.
    """
    is_whole = view.count(Table.EXTENTS) == view.count(Table.BLOCKS)
    if is_whole and all(is_extent(*row) for row in view.scan(Table.EXTENTS)):
        yield from (extent for extent, _ in allocated_extents(view))
        return
    taken = {unpack_extent(*row)[0] for row in view.scan(Table.EXTENTS) if is_extent(*row)}
    for _, value in view.scan(Table.BLOCKS):
        with suppress(CorruptRecordError, UnsupportedFormatError):
            taken.add(unpack_block(value).extent)
    yield from sorted(taken)


def allocated_backwards(view: ReadView, before: Extent | None = None) -> Iterator[tuple[Extent, BlockKey]]:
    """Yield extents and their blocks from the end of the disk, or from the one in front of `before`, backwards.

    Rows that are damaged are left out.
    """
    start = None if before is None else pack_extent(before, BlockKey(bytes(32)))[0]
    for key, value in view.scan_back(Table.EXTENTS, start):
        if is_extent(key, value):
            yield unpack_extent(key, value)


def move_block(view: WriteView, key: BlockKey, moved: BlockRecord) -> None:
    """Name the new place of a block whose bytes have been copied there; all else stays."""
    old = find_block(view, key)
    assert old is not None, "nothing changes the store between a copy and its commit"
    _drop_extent(view, old)
    view.put(Table.BLOCKS, key, pack_block(replace(old, extent=moved.extent)))
    view.put(Table.EXTENTS, *pack_extent(moved.extent, key))


def _drop_extent(view: WriteView, record: BlockRecord) -> None:
    view.delete(Table.EXTENTS, pack_extent(record.extent, BlockKey(bytes(32)))[0])


def _forget_stamp(view: WriteView, record: BlockRecord) -> None:
    if record.references == 0:
        view.delete(Table.LRU, pack_stamp(record.stamp))
