# SPDX-License-Identifier: Apache-2.0
"""Faults: damaged bytes, short and missing files, reused extents. A fault costs its block, nothing else."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.errors import (
    CorruptRecordError,
    KVStoreError,
    StoreIOError,
    UnsupportedFormatError,
)
from kvstore.spec import BlockKey
from kvstore.store import Access, Outcome
from kvstore.tiers.catalogue import Catalogue, Table
from kvstore.tiers.disk import DiskTier, Found
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, unpack_block
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    requests_for,
    same_block,
)

EXTENT_FILE = Path("extents") / "00000000.extents"


def _write_stream(path: Path, count: int) -> None:
    with open_store(path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(count), {"next": count})


def _offset(path: Path, number: int) -> int:
    """Where the extent of block `number` begins."""
    catalogue = Catalogue(path / "catalogue", writable=False, durable=False)
    with catalogue.read() as view:
        value = view.get(Table.BLOCKS, block_key(number))
    catalogue.close()
    assert value is not None
    return unpack_block(value).extent.offset


def _flip(path: Path, offset: int) -> None:
    with (path / EXTENT_FILE).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("where", [0, 10, EXTENT_HEADER_NBYTES, EXTENT_HEADER_NBYTES + 40, 1000, EXTENT_NBYTES // 2])
def test_a_damaged_byte_costs_its_block_and_verify_names_it(tmp_path: Path, where: int) -> None:
    _write_stream(tmp_path, 4)
    _flip(tmp_path, _offset(tmp_path, 2) + where)
    with open_store(tmp_path, Access.READ) as store:
        requests = requests_for(make_blocks(4))
        report = store.fetch(requests)
        assert report.outcomes == [Outcome.DISK, Outcome.DISK, Outcome.DAMAGED, Outcome.DISK]
        assert list(report.reasons) == [2]
        assert all(same_block(requests[number].slot, make_slot(number)) for number in (0, 1, 3))
        (fault,) = store.verify().faults
        assert (fault.stream, fault.index, fault.start_s, fault.end_s) == ("lecture", 2, 2.0, 3.0)
        assert store.verify("lecture").faults == [fault]
        assert store.stats().disk.damaged == 1


def test_a_damaged_layer_leaves_the_other_layers_readable(tmp_path: Path) -> None:
    _write_stream(tmp_path, 1)
    _flip(tmp_path, _offset(tmp_path, 0) + EXTENT_NBYTES - 4096)
    with open_store(tmp_path, Access.READ) as store:
        assert store.fetch(requests_for(make_blocks(1), range(1))).outcomes == [Outcome.DISK]
        assert store.fetch(requests_for(make_blocks(1), range(2, 3))).outcomes == [Outcome.DAMAGED]


def test_a_damaged_block_is_replaced_when_it_is_stored_again(tmp_path: Path) -> None:
    _write_stream(tmp_path, 3)
    _flip(tmp_path, _offset(tmp_path, 1) + 1000)
    with open_store(tmp_path) as store:
        assert store.fetch(requests_for(make_blocks(3))).outcomes[1] is Outcome.DAMAGED
        assert store.put([block_key(1)], [make_slot(1)], [40]) == [Outcome.STORED]
        assert store.verify().is_clean
    with open_store(tmp_path, Access.READ) as store:
        assert store.fetch(requests_for(make_blocks(3))).outcomes == [Outcome.DISK] * 3


def test_a_truncated_extent_file_costs_only_what_was_cut_off(tmp_path: Path) -> None:
    _write_stream(tmp_path, 4)
    os.truncate(tmp_path / EXTENT_FILE, 2 * EXTENT_NBYTES + 4096)
    with open_store(tmp_path) as store:
        report = store.fetch(requests_for(make_blocks(4)))
        assert report.outcomes == [Outcome.DISK, Outcome.DISK, Outcome.DAMAGED, Outcome.DAMAGED]
        assert [fault.index for fault in store.verify().faults] == [2, 3]


def test_a_missing_extent_file_costs_its_blocks(tmp_path: Path) -> None:
    _write_stream(tmp_path, 2)
    (tmp_path / EXTENT_FILE).unlink()
    with open_store(tmp_path, Access.READ) as store:
        assert store.fetch(requests_for(make_blocks(2))).outcomes == [Outcome.DAMAGED] * 2
        assert len(store.verify().faults) == 2


@pytest.mark.parametrize("table", [Table.BLOCKS, Table.DIRECTORIES])
def test_a_damaged_catalogue_value_costs_its_block(tmp_path: Path, table: Table) -> None:
    _write_stream(tmp_path, 2)
    catalogue = Catalogue(tmp_path / "catalogue", writable=True, durable=False)
    catalogue.write(lambda view: view.put(table, block_key(0), b"\x01\x02"))
    catalogue.close()
    with open_store(tmp_path, Access.READ) as store:
        report = store.fetch(requests_for(make_blocks(2), range(1)))
        assert report.outcomes == [Outcome.DAMAGED, Outcome.DISK]
        assert not store.verify("lecture").is_clean


def test_verify_sees_a_block_that_is_gone_and_an_extent_nobody_owns(tmp_path: Path) -> None:
    _write_stream(tmp_path, 3)
    catalogue = Catalogue(tmp_path / "catalogue", writable=True, durable=False)
    catalogue.write(lambda view: view.delete(Table.BLOCKS, block_key(1)))
    catalogue.close()
    with open_store(tmp_path, Access.READ) as store:
        report = store.verify()
        assert [(fault.index, fault.reason) for fault in report.faults] == [(1, "the block is not stored")]
        assert any("belongs to no block" in problem for problem in report.structure)
        assert store.fetch(requests_for(make_blocks(3))).outcomes[1] is Outcome.MISS


def test_verify_sees_extents_that_overlap(tmp_path: Path) -> None:
    _write_stream(tmp_path, 2)
    catalogue = Catalogue(tmp_path / "catalogue", writable=True, durable=False)
    catalogue.write(
        lambda view: view.put(Table.EXTENTS, struct.pack(">IQ", 0, 4096), struct.pack("<Q", 4096) + block_key(9))
    )
    catalogue.close()
    with open_store(tmp_path, Access.READ) as store:
        assert any("overlap" in problem for problem in store.verify().structure)


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    _write_stream(tmp_path, 1)
    catalogue = Catalogue(tmp_path / "catalogue", writable=True, durable=False)
    catalogue.write(lambda view: view.put(Table.META, b"format", struct.pack("<4sHHd", b"KVXS", 2, 0, 0.0)))
    catalogue.close()
    for access in Access:
        with pytest.raises(UnsupportedFormatError, match=r"2\.0"):
            open_store(tmp_path, access)


class _LateReader:
    """Answers the first look-up with what was true a moment ago: a reader that a writer overtook."""

    def __init__(self, disk: DiskTier, keys: Sequence[BlockKey]) -> None:
        self._disk = disk
        self._stale = disk.look_up(keys, [True] * len(keys))
        self._true_look_up = disk.look_up
        disk.look_up = self.look_up  # type: ignore[method-assign]

    def look_up(self, keys: Sequence[BlockKey], with_directory: Sequence[bool]) -> list[Found | KVStoreError | None]:
        self._disk.look_up = self._true_look_up  # type: ignore[method-assign]
        return self._stale


@pytest.mark.parametrize("layers", [None, range(1, 2)])
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_reader_whose_extent_was_reused_misses_or_finds_the_new_place(
    tmp_path: Path, layers: range | None, comes_back: bool
) -> None:
    with open_store(tmp_path) as store:
        store.put([block_key(1)], [make_slot(1)], [40])
        late = _LateReader(store._disk, [block_key(1)])
        before = store._disk.allocator.free_ranges()
        store.remove([block_key(1)])
        store.put([block_key(2)], [make_slot(2)], [40])
        assert store._disk.allocator.free_ranges() == before, "block 2 took the place of block 1"
        if comes_back:
            store.put([block_key(1)], [make_slot(1)], [40])
        store._disk.look_up = late.look_up  # type: ignore[method-assign]
        requests = requests_for(make_blocks(1, first=1), layers)
        assert store.fetch(requests).outcomes == [Outcome.DISK if comes_back else Outcome.MISS]
        if comes_back and layers is None:
            assert same_block(requests[0].slot, make_slot(1))


def test_a_write_error_surfaces_in_flush_and_the_stream_goes_on_from_its_cursor(tmp_path: Path) -> None:
    _write_stream(tmp_path, 2)
    with open_store(tmp_path) as store:
        (tmp_path / "extents").rename(tmp_path / "elsewhere")
        store.append("lecture", make_blocks(2, first=2), {"next": 4})
        with pytest.raises(StoreIOError):
            store.flush()
        (tmp_path / "elsewhere").rename(tmp_path / "extents")
        assert store.manifest("lecture").cursor == {"next": 2}
        store.append("lecture", make_blocks(2, first=2), {"next": 4})
        store.flush()
        assert store.fetch(requests_for(make_blocks(4))).outcomes.count(Outcome.MISS) == 0
    with open_store(tmp_path) as store:
        assert store.manifest("lecture").cursor == {"next": 4}
        assert store.verify().is_clean


def test_a_store_that_never_finished_being_made_is_made_by_the_next_writer(tmp_path: Path) -> None:
    (tmp_path / "catalogue").mkdir()
    Catalogue(tmp_path / "catalogue", writable=True, durable=False).close()
    with pytest.raises(KVStoreError, match="never finished"):
        open_store(tmp_path, Access.READ)
    with open_store(tmp_path) as store:
        assert store.get([block_key(1)], [empty_slot()]) == [Outcome.MISS]


def test_a_catalogue_without_its_tables_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "catalogue").mkdir()
    (tmp_path / "catalogue" / "data.mdb").write_bytes(b"x" * 8192)
    with pytest.raises(CorruptRecordError):
        open_store(tmp_path)
