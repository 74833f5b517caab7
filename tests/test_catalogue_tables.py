# SPDX-License-Identifier: Apache-2.0
"""What the tables promise together: references, order of eviction, manifests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.codec import Profile
from kvstore.errors import (
    ConfigError,
    CorruptRecordError,
    StreamNotFoundError,
)
from kvstore.spec import BlockKey, ModelSpec
from kvstore.tiers.base import Extent
from kvstore.tiers.catalogue import Catalogue, Table, WriteView
from kvstore.tiers.manifest import StreamHeader
from kvstore.tiers.tables.blocks import (
    PlacedBlock,
    delete_unreferenced,
    find_block,
    insert_blocks,
    oldest_first,
    touch,
)
from kvstore.tiers.tables.records import (
    BlockRecord,
    Entry,
)
from kvstore.tiers.tables.streams import (
    append_entries,
    delete_stream,
    ensure_stream,
    find_stream,
    read_manifest,
    read_summaries,
)

SPEC = ModelSpec(
    num_layers=2,
    kv_heads=2,
    key_dim=8,
    value_dim=4,
    dtype="bfloat16",
    key_space="pre",
    architecture="test",
    rope="{}",
    revision="0",
)
HEADER = StreamHeader("lecture", SPEC, 16, Profile.LOSSLESS, "window=64", {"fps": 25.0}, 1.0)
RECORD = BlockRecord(
    num_tokens=16, extent=Extent(0, 4096, 4096), record_nbytes=4000, generation=7, references=0, stamp=7
)
ENTRY = Entry(3, BlockKey(b"k" * 32), 16, 48, 1.5, 2.5, -1)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    opened = Catalogue(tmp_path, writable=True, durable=False)
    yield opened
    opened.close()


def _key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


def _record(number: int) -> BlockRecord:
    return replace(RECORD, extent=Extent(0, number * 4096, 4096), generation=number, stamp=number)


def test_blocks_are_evicted_in_order_of_their_last_use(catalogue: Catalogue) -> None:
    def fill(view: WriteView) -> None:
        for number in (1, 2, 3):
            insert_blocks(view, [PlacedBlock(_key(number), _record(number), b"directory")])
        touch(view, _key(1), 10)

    catalogue.write(fill)
    with catalogue.read() as view:
        assert [candidate.key for candidate in oldest_first(view, {})] == [_key(2), _key(3), _key(1)]


def test_a_replaced_block_keeps_its_references_and_gives_its_extent_back(catalogue: Catalogue) -> None:
    catalogue.write(lambda view: ensure_stream(view, HEADER))
    catalogue.write(lambda view: insert_blocks(view, [PlacedBlock(_key(1), _record(1), b"old")]))
    catalogue.write(lambda view: append_entries(view, 1, [replace(ENTRY, index=0, key=_key(1))], [b""], b"{}"))
    freed = catalogue.write(lambda view: insert_blocks(view, [PlacedBlock(_key(1), _record(2), b"new")]))
    assert freed == [_record(1).extent]
    with catalogue.read() as view:
        assert find_block(view, _key(1)) == replace(_record(2), references=1)
        assert (view.count(Table.EXTENTS), view.count(Table.LRU)) == (1, 0)


def test_a_block_in_a_stream_is_not_deleted(catalogue: Catalogue) -> None:
    catalogue.write(lambda view: ensure_stream(view, HEADER))
    catalogue.write(lambda view: insert_blocks(view, [PlacedBlock(_key(1), _record(1), b"")]))
    catalogue.write(lambda view: append_entries(view, 1, [replace(ENTRY, index=0, key=_key(1))], [b""], b"{}"))
    assert catalogue.write(lambda view: delete_unreferenced(view, _key(1))) is None
    with catalogue.read() as view:
        assert list(oldest_first(view, {})) == []


def _two_streams_that_share_block_one(catalogue: Catalogue) -> None:
    def fill(view: WriteView) -> None:
        for number in (1, 2):
            insert_blocks(view, [PlacedBlock(_key(number), _record(number), b"")])
        ensure_stream(view, HEADER)
        ensure_stream(view, replace(HEADER, name="other"))
        entries = [replace(ENTRY, index=index, key=_key(number)) for index, number in enumerate((1, 2, 1))]
        append_entries(view, 1, entries, [b"a", b"b", b"c"], b'{"next":3}')
        append_entries(view, 2, [replace(ENTRY, index=0, key=_key(1))], [b"d"], b"{}")

    catalogue.write(fill)


def test_removing_a_stream_frees_only_what_no_other_stream_needs(catalogue: Catalogue) -> None:
    _two_streams_that_share_block_one(catalogue)
    assert catalogue.write(lambda view: delete_stream(view, "lecture")) == [(_key(2), _record(2).extent)]
    with catalogue.read() as view:
        assert find_block(view, _key(1)) == replace(_record(1), references=1)
        assert (view.count(Table.ENTRIES), view.count(Table.SUMMARIES), view.count(Table.STATES)) == (1, 1, 1)
        with pytest.raises(StreamNotFoundError):
            find_stream(view, "lecture")


def test_a_damaged_entry_does_not_make_its_stream_immortal(catalogue: Catalogue) -> None:
    _two_streams_that_share_block_one(catalogue)
    catalogue.write(lambda view: view.put(Table.ENTRIES, (1).to_bytes(8, "big") + bytes(8), b"\x01"))
    assert catalogue.write(lambda view: delete_stream(view, "lecture")) == [(_key(2), _record(2).extent)]


def test_a_manifest_holds_what_was_appended(catalogue: Catalogue) -> None:
    _two_streams_that_share_block_one(catalogue)
    with catalogue.read() as view:
        manifest = read_manifest(view, "lecture")
        assert [entry.key for entry in manifest.entries] == [_key(1), _key(2), _key(1)]
        assert (manifest.cursor, manifest.num_tokens, manifest.is_complete) == ({"next": 3}, 48, False)
        assert manifest.header == HEADER
        assert [read_summaries(view, 1, first, 2) for first in (0, 1, 2, 3)] == [
            {0: b"a", 1: b"b"},
            {1: b"b", 2: b"c"},
            {2: b"c"},
            {},
        ]


def test_a_gap_in_a_manifest_is_refused(catalogue: Catalogue) -> None:
    catalogue.write(lambda view: ensure_stream(view, HEADER))
    catalogue.write(lambda view: insert_blocks(view, [PlacedBlock(_key(1), _record(1), b"")]))
    with pytest.raises(CorruptRecordError, match="entry 1 where 0"):
        catalogue.write(lambda view: append_entries(view, 1, [replace(ENTRY, index=1, key=_key(1))], [b""], b"{}"))


def test_an_entry_without_its_block_is_refused(catalogue: Catalogue) -> None:
    catalogue.write(lambda view: ensure_stream(view, HEADER))
    with pytest.raises(CorruptRecordError, match="not stored"):
        catalogue.write(lambda view: append_entries(view, 1, [replace(ENTRY, index=0)], [b""], b"{}"))


def test_a_lost_entry_is_noticed_when_the_manifest_is_read(catalogue: Catalogue) -> None:
    _two_streams_that_share_block_one(catalogue)
    catalogue.write(lambda view: view.delete(Table.ENTRIES, (1).to_bytes(8, "big") + (1).to_bytes(8, "big")))
    with catalogue.read() as view, pytest.raises(CorruptRecordError, match="2 entries found, 3 announced"):
        read_manifest(view, "lecture")


def test_an_equal_header_resumes_and_another_one_is_refused(catalogue: Catalogue) -> None:
    catalogue.write(lambda view: ensure_stream(view, HEADER))
    catalogue.write(lambda view: ensure_stream(view, replace(HEADER, created_unix_s=2.0)))
    with pytest.raises(ConfigError, match="made otherwise"):
        catalogue.write(lambda view: ensure_stream(view, replace(HEADER, prefill="full")))


def test_the_longest_name_fits(catalogue: Catalogue) -> None:
    header = replace(HEADER, name="ü" * 200)
    catalogue.write(lambda view: ensure_stream(view, header))
    with catalogue.read() as view:
        assert find_stream(view, header.name).header == header
