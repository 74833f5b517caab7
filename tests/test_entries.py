# SPDX-License-Identifier: Apache-2.0
"""Packed entries act like a list of them, and a snapshot of a stream that has grown reads only what is new."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.session.recall import losses
from kvstore.spec import BlockKey
from kvstore.store import Entries, Entry
from kvstore.tiers.catalogue import ReadView, Table
from kvstore.tiers.tables.records import pack_entry
from tests.store_blocks import HEADER, make_blocks, open_store

MANY = 9000
"""More than two chunks of rows."""


def made(count: int, first: int = 0, group: int = 0) -> list[Entry]:
    """Entries of 3 tokens each."""
    key = BlockKey(bytes(range(32)))
    return [Entry(index, key, 3, 3 * index, index / 2, index / 2 + 1, group) for index in range(first, first + count)]


def test_entries_are_what_was_put_in() -> None:
    wanted, entries = made(MANY), Entries()
    for first, last in ((0, 1), (1, 4095), (4095, 4096), (4096, 4097), (4097, 8193), (8193, MANY)):
        entries = entries.followed_by(wanted[first:last])
    assert entries == wanted
    assert wanted == list(entries)
    assert entries.first_tokens.tolist() == [entry.first_token for entry in wanted]
    assert entries.sizes.tolist() == [3] * MANY
    assert entries.end_token == 3 * MANY
    chance = random.Random(0)
    for _ in range(20):
        start, stop = (chance.choice([None, chance.randint(-MANY, MANY)]) for _ in range(2))
        step, index = chance.choice([None, 1, 7, 5000]), chance.randint(-MANY, MANY - 1)
        part = slice(start, stop, step)
        assert entries[part] == wanted[part]
        assert entries[part].first_tokens.tolist() == [entry.first_token for entry in wanted[part]]
        assert entries[index] == wanted[index]
    assert list(reversed(entries[:3])) == wanted[2::-1]
    for index in (MANY, -MANY - 1):
        with pytest.raises(IndexError):
            entries[index]


def test_no_entries_are_a_value_too() -> None:
    assert Entries() == []
    assert Entries.of(()) == Entries()
    assert not Entries()
    assert Entries().end_token == 0
    assert Entries() != [made(1)]
    assert Entries() != 0


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 8200])
def test_what_was_taken_stays_while_others_go_on_in_two_ways(count: int) -> None:
    begun = Entries.of(made(count))
    firsts = begun.first_tokens
    left = begun.followed_by(made(700, count, group=1))
    right = begun.followed_by(made(900, count, group=2))
    again = begun.followed_by(made(800, count, group=1))
    assert begun == made(count)
    assert torch.equal(firsts, 3 * torch.arange(count))
    assert left == [*made(count), *made(700, count, group=1)]
    assert right == [*made(count), *made(900, count, group=2)]
    assert again == [*made(count), *made(800, count, group=1)]
    assert left == again[: count + 700]
    assert left != right


def test_losses_are_told_in_order_each_once() -> None:
    entries = Entries.of([replace(entry, key=BlockKey(bytes([entry.index]) * 32)) for entry in made(6)])
    torn, gone = (entries[5], "torn"), (entries[2], "gone")
    assert losses(entries, {}, {}) == []
    assert losses(entries, {5: "torn"}, {}) == [torn]
    assert losses(entries, {5: "torn"}, {entries[2].key: "gone"}) == [gone, torn]
    assert losses(entries, {5: "torn", 2: "torn"}, {entries[2].key: "gone"}) == [gone, torn]


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows[:-1],
        lambda rows: rows + b"\x01",
        lambda rows: rows[:72] + b"\x00" + rows[73:],
        lambda rows: rows[:72] + b"\x02" + rows[73:],
        lambda rows: rows[: 72 + 48] + b"\xff" * 8 + rows[72 + 56 :],
    ],
)
def test_a_damaged_row_among_many_is_refused(damage: object) -> None:
    assert callable(damage)
    rows = b"".join(map(pack_entry, made(3)))
    begun = Entries.of(made(2))
    with pytest.raises((CorruptRecordError, UnsupportedFormatError), match=r"entry [345]"):
        begun.followed_by_packed(damage(rows))
    assert begun == made(2)


def test_a_snapshot_of_a_stream_that_grew_reads_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    scan = ReadView.scan

    def counting(
        self: ReadView, table: Table, start: bytes = b"", prefix: bytes = b""
    ) -> Iterator[tuple[bytes, bytes]]:
        for key, value in scan(self, table, start, prefix):
            if table is Table.ENTRIES:
                read.append(int.from_bytes(key[8:], "big"))
            yield key, value

    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(5), {"next": 5})
        store.flush()
        known = store.manifest("lecture")
        monkeypatch.setattr(ReadView, "scan", counting)
        assert store.manifest("lecture", known) == known
        assert read == []
        store.append("lecture", make_blocks(3, 5), {"next": 8})
        store.flush()
        grown = store.manifest("lecture", known)
        assert read == [5, 6, 7]
        assert grown == store.manifest("lecture")
        assert grown.cursor == {"next": 8}
        assert len(known.entries) == 5


def test_a_snapshot_of_a_stream_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(5), {})
        store.flush()
        known = store.manifest("lecture")
        store.rollback("lecture", 120)
        assert len(store.manifest("lecture", known).entries) == 3
        # The same blocks at other times: their names do not tell.
        late = [replace(block, entry=replace(block.entry, start_s=9.0, end_s=9.5)) for block in make_blocks(3, 3)]
        store.append("lecture", late, {})
        store.flush()
        found = store.manifest("lecture", known)
        assert found == store.manifest("lecture")
        assert [entry.start_s for entry in found.entries[3:]] == [9.0] * 3
        assert found.lineage != known.lineage
        store.remove_stream("lecture")
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(6), {})
        store.flush()
        assert store.manifest("lecture", found) == store.manifest("lecture")
        assert store.manifest("lecture", found).entries != found.entries
