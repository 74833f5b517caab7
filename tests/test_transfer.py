# SPDX-License-Identifier: Apache-2.0
"""Encoded records in and out of a store: bit for bit, checked, idempotent, beside what else the store does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.errors import ReadOnlyError
from kvstore.store import Access, Outcome, Store
from kvstore.tiers.upkeep.transfer import EncodedBlock, RecordTransfer
from tests.store_blocks import (
    EXTENT_NBYTES,
    block_key,
    empty_slot,
    make_slot,
    open_store,
    same_block,
)

EXTENT_FILE = Path("extents") / "00000000.extents"


@contextmanager
def _store(
    path: Path, access: Access = Access.WRITE, disk_nbytes: int | None = None
) -> Iterator[tuple[Store, RecordTransfer]]:
    with open_store(path, access, disk_nbytes=disk_nbytes) as store:
        yield store, RecordTransfer(store._disk, store._pool)


def _records(path: Path, numbers: range) -> list[EncodedBlock]:
    """Records of blocks, from a store made for it."""
    keys = [block_key(number) for number in numbers]
    with _store(path) as (store, transfer):
        outcomes = store.put(keys, [make_slot(number) for number in numbers], [40] * len(keys))
        assert set(outcomes) == {Outcome.STORED}
        found = list(transfer.read(keys))
    assert all(found)
    return [block for block in found if block is not None]


def test_records_go_from_store_to_store_and_decode_to_the_same_bits(tmp_path: Path) -> None:
    blocks = _records(tmp_path / "here", range(500))
    with _store(tmp_path / "there") as (store, transfer):
        assert transfer.write(blocks) == [Outcome.STORED] * 500
        assert list(transfer.read([block.key for block in blocks])) == blocks
        slots = [empty_slot() for _ in blocks]
        assert store.get([block.key for block in blocks], slots) == [Outcome.DISK] * 500
        assert all(same_block(slot, make_slot(number)) for number, slot in enumerate(slots))
        assert store.verify().is_clean


def test_a_block_that_is_there_stays_and_one_that_is_missing_or_damaged_is_not_read(tmp_path: Path) -> None:
    blocks = _records(tmp_path, range(3))
    with _store(tmp_path) as (store, transfer):
        before = store.stats().usage
        assert transfer.write([*blocks, *blocks]) == [Outcome.STORED] * 6
        assert store.stats().usage == before
        with (tmp_path / EXTENT_FILE).open("r+b") as file:
            file.seek(EXTENT_NBYTES + 1000)
            file.write(bytes(100))
        assert list(transfer.read([block_key(number) for number in range(4)])) == [blocks[0], None, blocks[2], None]


def test_bytes_that_are_no_record_are_refused_alone(tmp_path: Path) -> None:
    first, second, third = _records(tmp_path / "here", range(3))
    wrong = [
        replace(second, record=b""),
        replace(second, record=second.record[:-1]),
        replace(second, record=b"x" * 4096),
        replace(second, num_tokens=39),
    ]
    with _store(tmp_path / "there") as (store, transfer):
        expected = [Outcome.STORED, *[Outcome.DAMAGED] * len(wrong), Outcome.STORED]
        assert transfer.write([first, *wrong, third]) == expected
        assert store.exists([first.key, second.key, third.key]) == [True, False, True]
        assert store.verify().is_clean


def test_a_full_store_evicts_what_is_old_and_not_what_is_written(tmp_path: Path) -> None:
    blocks = _records(tmp_path / "here", range(40))
    with _store(tmp_path / "there", disk_nbytes=(1 << 19) + 20 * EXTENT_NBYTES) as (store, transfer):
        assert store.put([block_key(1000)], [make_slot(1000)], [40]) == [Outcome.STORED]
        outcomes = transfer.write(blocks)
        assert not store.exists([block_key(1000)])[0]
        num_stored = outcomes.count(Outcome.STORED)
        assert outcomes == [Outcome.STORED] * num_stored + [Outcome.FULL] * (40 - num_stored)
        assert 10 < num_stored < 40
        assert store.exists([block.key for block in blocks]) == [True] * num_stored + [False] * (40 - num_stored)
        assert store.verify().is_clean


def test_a_reader_can_read_records_and_not_write_them(tmp_path: Path) -> None:
    blocks = _records(tmp_path, range(2))
    with _store(tmp_path, Access.READ) as (_, transfer):
        assert list(transfer.read([block.key for block in blocks])) == blocks
        with pytest.raises(ReadOnlyError):
            transfer.write([replace(blocks[0], key=block_key(9))])
