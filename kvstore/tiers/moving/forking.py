# SPDX-License-Identifier: Apache-2.0
"""Forking, continuing and rolling back streams: one transaction each, then extents are free and memory follows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from kvstore.tiers.data_path import DataPath
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.manifest import JSON, dump_json
from kvstore.tiers.tables.forks import cut_stream, fork_stream
from kvstore.tiers.tables.prefixes import KeyOf, continue_stream, find_continuation
from kvstore.tiers.tables.streams import find_stream


def fork(
    disk: DiskTier, data: DataPath | None, source: str, name: str, at: int | None, cursor: Mapping[str, JSON] | None
) -> None:
    """Make a stream that begins like another; see `Store.fork`."""
    if data is not None and data.write is not None:
        data.write.writer.flush()
    if cursor is None and at is not None:
        cursor = {}
    cursor_json = None if cursor is None else dump_json(dict(cursor), "cursor")
    with disk.mutation:
        with disk.catalogue.read() as view:
            header = find_stream(view, source).header
        forked = replace(header, name=name, created_unix_s=time.time())
        disk.catalogue.write(lambda view: fork_stream(view, source, forked, at, cursor_json))


def adopt(disk: DiskTier, data: DataPath | None, name: str, key_of: KeyOf, kind: str) -> int:
    """Continue a stream by what others hold; returns the tokens added. See `Store.adopt`."""
    if data is None or data.write is None:
        return _adopt(disk, name, key_of, kind)
    with data.write.appender.stopped(name):
        data.write.writer.flush()
        return _adopt(disk, name, key_of, kind)


def _adopt(disk: DiskTier, name: str, key_of: KeyOf, kind: str) -> int:
    with disk.mutation:  # what is found stays true until it is written
        with disk.catalogue.read() as view:
            found = find_continuation(view, name, key_of, kind)
        if found.entries:
            disk.catalogue.write(lambda view: continue_stream(view, name, found))
    return sum(entry.num_tokens for entry in found.entries)


def rollback(disk: DiskTier, data: DataPath | None, name: str, at: int, cursor: Mapping[str, JSON]) -> int:
    """Cut a stream; returns the bytes freed. See `Store.rollback`."""
    cursor_json = dump_json(dict(cursor), "cursor")
    if data is None or data.write is None:
        return _cut(disk, data, name, at, cursor_json)
    with data.write.appender.stopped(name):
        data.write.writer.flush()
        return _cut(disk, data, name, at, cursor_json)


def _cut(disk: DiskTier, data: DataPath | None, name: str, at: int, cursor_json: bytes) -> int:
    with disk.changing():
        gone = disk.catalogue.write(lambda view: cut_stream(view, name, at, cursor_json))
        disk.allocator.release(extent for _, extent in gone)
    if data is not None:
        for key, _ in gone:
            data.host.forget(key)
    return sum(extent.nbytes for _, extent in gone)
