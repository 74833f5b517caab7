# SPDX-License-Identifier: Apache-2.0
"""Tables `blocks`, `directories`, `extents`, `lru`: what the disk tier holds, kept consistent in one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.policy import Candidate
from kvstore.spec import BlockKey
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import ReadView, Table, WriteView
from kvstore.tiers.tables.awaited import count_awaiting, count_entries, find_awaited, set_awaiting
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


def find_sound(view: ReadView, key: BlockKey) -> BlockRecord | None:
    """Like `find_block`; a damaged entry is None, for those who go on with other blocks, or write this one again."""
    with suppress(CorruptRecordError, UnsupportedFormatError):
        return find_block(view, key)
    return None


def find_directory(view: ReadView, key: BlockKey) -> bytes | None:
    """Return the first bytes of the block's record: header and plane directory, unchecked."""
    return view.get(Table.DIRECTORIES, key)


def has_block(view: ReadView, key: BlockKey) -> bool:
    """True when the block is stored; does not read its record."""
    return view.get(Table.BLOCKS, key) is not None


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block that has been written and is not yet in the catalogue.

    Args:
        key: its name.
        record: where it lies; `references` is 0, or 1 for the body of an object that is named with it.
        directory: the first bytes of its record; empty for the body of an object.
    """

    key: BlockKey
    record: BlockRecord
    directory: bytes


def find_stored(view: ReadView, keys: Iterable[BlockKey]) -> set[BlockKey]:
    """Those of the keys whose blocks `find_sound` finds."""
    return {BlockKey(key) for key, value in view.get_many(Table.BLOCKS, keys).items() if _is_sound(value)}


def insert_blocks(view: WriteView, blocks: Sequence[PlacedBlock]) -> list[Extent]:
    """Store where freshly written blocks lie; a block of a key that is there is replaced and keeps its references.

    A block that was lost, and that entries name still, has their references from the start. Where the entry of the
    replaced block is damaged, they are counted.

    Args:
        view: the transaction.
        blocks: of distinct keys.

    Returns:
        The extents that replaced blocks leave, to be freed after the commit.
    """
    blocks = sorted(blocks, key=lambda block: block.key)
    keys = [block.key for block in blocks]
    known = view.get_many(Table.BLOCKS, keys).keys() | find_awaited(view, keys)
    freed: list[Extent] = []
    if known:
        cleared = {key: _clear(view, key) for key in keys if key in known}
        freed = [extent for _, extent in cleared.values() if extent is not None]
        blocks = [
            replace(block, record=replace(block.record, references=cleared[block.key][0]))
            if block.key in cleared
            else block
            for block in blocks
        ]
    view.put_many(Table.BLOCKS, [(block.key, pack_block(block.record)) for block in blocks])
    heads = [(block.key, block.directory) for block in blocks if not block.record.is_object]
    view.put_many(Table.DIRECTORIES, heads)
    view.put_many(Table.EXTENTS, sorted(pack_extent(block.record.extent, block.key) for block in blocks))
    idle = [(pack_stamp(block.record.stamp), block.key) for block in blocks if block.record.references == 0]
    view.put_many(Table.LRU, sorted(idle))
    return freed


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


def await_block(view: WriteView, key: BlockKey) -> bool:
    """Count one more stream entry that names a block, which may be lost; returns whether it is stored."""
    if find_sound(view, key) is not None:
        add_reference(view, key)
        return True
    set_awaiting(view, key, count_awaiting(view, key) + 1)
    return False


def drop_reference(view: WriteView, key: BlockKey) -> Extent | None:
    """Undo one `add_reference` or `await_block`, before the entry that names the block is deleted.

    A block that is gone, or damaged, is no error: removing a damaged stream must succeed.

    Returns:
        The extent of the block, to be freed after the commit, if that was its last reference and removed it.
    """
    record = find_sound(view, key)
    if record is None:
        set_awaiting(view, key, count_awaiting(view, key) - 1)
        return None
    if record.references == 0:
        return None  # a wrong count must not cost a block that somebody may need
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
    """Remove a block that no stream needs; returns its extent, or None when it stays, was not there, or is damaged."""
    record = find_sound(view, key)
    if record is None or record.references > 0:
        return None
    return delete_block(view, key, record)


def touch(view: WriteView, key: BlockKey, stamp: int) -> None:
    """Mark a block as used when `stamp` was drawn; does nothing for one used since, gone, damaged, or in a stream."""
    record = find_sound(view, key)
    if record is None or record.references > 0 or record.stamp >= stamp:
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
        with suppress(CorruptRecordError):
            key = check_key(value)
            record = find_sound(view, key)
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


def _clear(view: WriteView, key: BlockKey) -> tuple[int, Extent | None]:
    """Unlist what is replaced; returns how many entries name the block, and the extent that it leaves."""
    old = find_sound(view, key)
    if old is not None:
        _drop_extent(view, old)
        _forget_stamp(view, old)
        return old.references, old.extent
    if not has_block(view, key):
        references, extents = count_awaiting(view, key), []
    else:  # its entry is damaged: only the other tables know
        references = count_entries(view, key)
        extents = [
            unpack_extent(*row)[0]
            for row in view.scan(Table.EXTENTS)
            if is_extent(*row) and unpack_extent(*row)[1] == key
        ]
        for stamp in [stamp for stamp, value in view.scan(Table.LRU) if value == key]:
            view.delete(Table.LRU, stamp)
    set_awaiting(view, key, 0)
    for extent in extents:
        view.delete(Table.EXTENTS, pack_extent(extent, key)[0])
    return references, extents[0] if extents else None


def _is_sound(value: bytes) -> bool:
    with suppress(CorruptRecordError, UnsupportedFormatError):
        unpack_block(value)
        return True
    return False


def _drop_extent(view: WriteView, record: BlockRecord) -> None:
    view.delete(Table.EXTENTS, pack_extent(record.extent, BlockKey(bytes(32)))[0])


def _forget_stamp(view: WriteView, record: BlockRecord) -> None:
    if record.references == 0:
        view.delete(Table.LRU, pack_stamp(record.stamp))
