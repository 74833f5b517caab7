# SPDX-License-Identifier: Apache-2.0
"""Reads what a store says about its streams and blocks, beside any writer, without moving a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from kvstore.config import Access, Durability, StoreConfig
from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError, KVStoreError, StoreNotFoundError, StreamNotFoundError
from kvstore.native import IoPool
from kvstore.spec import BlockKey, ModelSpec
from kvstore.tiers.disk import DiskTier, Found
from kvstore.tiers.manifest import Manifest
from kvstore.tiers.tables.streams import read_manifest, stream_rows

_IO_THREADS = 4


class Shelf:
    """The catalogue of one store, open for reading; made by `open_shelf`.

    Args:
        disk: the open folder.
    """

    def __init__(self, disk: DiskTier) -> None:
        self._disk = disk

    def names(self) -> list[str]:
        """All streams, by name."""
        with self._disk.catalogue.read() as view:
            return [row.header.name for row in stream_rows(view)]

    def manifest(self, name: str) -> Manifest:
        """A snapshot of one stream; raises `StreamNotFoundError`, which lists the streams that are there."""
        try:
            with self._disk.catalogue.read() as view:
                return read_manifest(view, name)
        except StreamNotFoundError as error:
            names = ", ".join(map(repr, self.names())) or "no stream at all"
            raise StreamNotFoundError(f"{self._disk.folder}: no stream {name!r}; the store holds {names}") from error

    def decision(self, spec: ModelSpec) -> Decision | None:
        """How new blocks of a model are coded by lossy profiles; None before it is calibrated."""
        return self._disk.calibrations.of_model(spec)

    def has_bases(self, spec: ModelSpec) -> bool:
        """Whether that is with bases."""
        return self._disk.calibrations.has_bases(spec)

    def blocks(self, keys: Sequence[BlockKey]) -> list[Found | None]:
        """Where blocks lie, with the directory of their records; None for one that is not stored.

        Raises:
            CorruptRecordError: an entry of the catalogue is damaged.
        """
        found = self._disk.look_up(keys, [True] * len(keys))
        blocks: list[Found | None] = []
        for key, result in zip(keys, found, strict=True):
            if isinstance(result, KVStoreError):
                raise CorruptRecordError(f"{self._disk.folder}: block {key.hex()[:16]}: {result}") from result
            blocks.append(result)
        return blocks


@contextmanager
def open_shelf(folder: Path) -> Iterator[Shelf]:
    """Open a store's catalogue for the length of a `with` block.

    Raises:
        StoreNotFoundError: there is no store; the message says how to make one.
        UnsupportedFormatError: the store is newer than this program.
        CorruptRecordError: the catalogue is damaged.
    """
    try:
        disk = DiskTier(folder, StoreConfig(Access.READ, Durability.NONE, host_nbytes=0))
    except StoreNotFoundError as error:
        raise StoreNotFoundError(f"{folder}: no store here; `kvstore ingest` makes one") from error
    with closing(disk):
        yield Shelf(disk)


@contextmanager
def open_for_upkeep(
    folder: Path, access: Access = Access.WRITE, *, may_create: bool = False
) -> Iterator[tuple[DiskTier, IoPool]]:
    """Open a store and what moves its extents; raises like `open_shelf` unless it may be created, and `BusyError`."""
    if not may_create:
        with open_shelf(folder):
            pass
    with (
        closing(DiskTier(folder, StoreConfig(access, Durability.COMMIT, host_nbytes=0))) as disk,
        closing(IoPool(_IO_THREADS)) as pool,
    ):
        yield disk, pool


def find_stream(folder: Path, name: str) -> Manifest:
    """Take a snapshot of one stream; raises like `open_shelf` and `Shelf.manifest`."""
    with open_shelf(folder) as shelf:
        return shelf.manifest(name)


def read_until(manifest: Manifest) -> float | None:
    """Seconds of the video that a stream holds; None when its producer does not say."""
    next_s = manifest.cursor.get("next_s")
    return float(next_s) if isinstance(next_s, (int, float)) else None
