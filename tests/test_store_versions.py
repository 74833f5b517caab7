# SPDX-License-Identifier: Apache-2.0
"""Stores of other versions: an old one is read, and brought up to date by a writer; a newer one is not written."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.errors import UnsupportedFormatError
from kvstore.store import Access, FetchRequest, Store
from kvstore.tiers.catalogue import Catalogue, Table
from kvstore.tiers.tables.folders import read_folders
from kvstore.tiers.tables.meta import FORMAT_MAJOR, FORMAT_MINOR
from tests.store_blocks import HEADER, LAYOUT, block_key, empty_slot, make_slot, open_store, same_block

GOLDEN = Path(__file__).parent / "golden" / "store-1.0.tar.gz"
"""Made by the last program that wrote format 1.0: stream `lecture` of blocks 0 to 2, and the plain block 9."""


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "store"


def _old_slot(number: int) -> Tensor:
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    slot.view(torch.int16)[:] = (torch.arange(LAYOUT.slot_nbytes // 2) * (number + 1) % 997).to(torch.int16)
    return slot


def _format(path: Path) -> tuple[int, int]:
    catalogue = Catalogue(path / "catalogue", writable=False, durable=False)
    with catalogue.read() as view:
        value = view.get(Table.META, b"format")
    catalogue.close()
    assert value is not None
    _, major, minor, _ = struct.unpack("<4sHHd", value)
    return major, minor


def _check(store: Store) -> None:
    assert store.manifest("lecture").header == HEADER
    requests = {number: FetchRequest(block_key(number), empty_slot()) for number in (0, 1, 2, 9)}
    assert all(outcome.is_hit for outcome in store.fetch(list(requests.values())).outcomes)
    assert all(same_block(request.slot, _old_slot(number)) for number, request in requests.items())
    assert store.verify().is_clean


def test_an_old_store_is_read_as_it_is(old_store: Path) -> None:
    with open_store(old_store, Access.READ) as store:
        _check(store)
    assert _format(old_store) == (1, 0)


def test_a_writer_brings_an_old_store_up_to_date_and_keeps_all_it_holds(old_store: Path, tmp_path: Path) -> None:
    with open_store(old_store) as store:
        _check(store)
    assert _format(old_store) == (FORMAT_MAJOR, FORMAT_MINOR)
    with Store.open(
        old_store,
        access=Access.WRITE,
        layout=LAYOUT,
        host_nbytes=4 * LAYOUT.slot_nbytes,
        extent_folders=[tmp_path / "other"],  # what 1.1 brought
    ) as store:
        store.put([block_key(50)], [make_slot(50)], [40])
        _check(store)
        with store._disk.catalogue.read() as view:
            assert read_folders(view).paths == (str(tmp_path / "other"),)


def test_a_store_of_a_newer_minor_version_is_read_and_not_written(old_store: Path) -> None:
    catalogue = Catalogue(old_store / "catalogue", writable=True, durable=False)
    newer = struct.pack("<4sHHd", b"KVXS", FORMAT_MAJOR, FORMAT_MINOR + 1, 0.0)
    catalogue.write(lambda view: view.put(Table.META, b"format", newer))
    catalogue.close()
    with open_store(old_store, Access.READ) as store:
        _check(store)
    with pytest.raises(UnsupportedFormatError, match="open it for reading"):
        open_store(old_store)
