# SPDX-License-Identifier: Apache-2.0
"""Removing streams and blocks: the catalogue lets go first, then the extents are free, then memory follows."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.spec import BlockKey
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import WriteView
from kvstore.tiers.data_path import DataPath
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.placing.allocator import MIN_STEP_NBYTES
from kvstore.tiers.tables.blocks import delete_unreferenced, has_block
from kvstore.tiers.tables.streams import delete_stream


def remove_stream(disk: DiskTier, data: DataPath | None, name: str) -> int:
    """Remove a stream and the blocks that only it needs; returns the bytes freed. See `Store.remove_stream`."""
    if data is None or data.write is None:
        return _remove_stream(disk, data, name)
    # An append under way may count on blocks of this stream that it finds stored already.
    with data.write.appender.stopped(name):
        data.write.writer.flush()
        return _remove_stream(disk, data, name)


def _remove_stream(disk: DiskTier, data: DataPath | None, name: str) -> int:
    with disk.changing():
        gone = disk.catalogue.write(lambda view: delete_stream(view, name))
        disk.allocator.release(extent for _, extent in gone)
        disk.allocator.trim(MIN_STEP_NBYTES)
    if data is not None:
        for key, _ in gone:
            data.host.forget(key)
    return sum(extent.nbytes for _, extent in gone)


def remove_blocks(disk: DiskTier, data: DataPath | None, keys: Sequence[BlockKey]) -> list[bool]:
    """Remove blocks that no stream needs, from disk or from memory alone; returns per key whether it was removed."""

    def drop(view: WriteView) -> list[tuple[Extent | None, bool]]:
        return [(delete_unreferenced(view, key), has_block(view, key)) for key in keys]

    with disk.changing():
        dropped = disk.catalogue.write(drop)
        disk.allocator.release(extent for extent, _ in dropped if extent is not None)
    removed: list[bool] = []
    for key, (extent, is_needed) in zip(keys, dropped, strict=True):
        is_removed = extent is not None
        if data is not None and is_removed:
            data.host.forget(key)
        elif data is not None and not is_needed:
            is_removed = data.host.forget_idle(key)
        removed.append(is_removed)
    return removed
