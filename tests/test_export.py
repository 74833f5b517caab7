# SPDX-License-Identifier: Apache-2.0
"""Exported streams come back bit for bit; a damaged, cut or hostile file makes no stream and does no harm."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.errors import (
    CapacityError,
    ConfigError,
    CorruptRecordError,
    KVStoreError,
    ReadOnlyError,
    StoreIOError,
    StreamNotFoundError,
    UnsupportedFormatError,
)
from kvstore.native import crc32c
from kvstore.store import JSON, Access, FetchRequest, Store
from kvstore.tiers.catalogue import Table
from kvstore.tiers.upkeep.export_stream import ExportReport, export_stream
from kvstore.tiers.upkeep.import_stream import ImportReport, import_stream
from kvstore.tiers.upkeep.repair import Repairer
from kvstore.tiers.upkeep.transfer import RecordTransfer
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    renumbered,
    same_block,
)

NUM_BLOCKS = 30
CURSOR: dict[str, JSON] = {"next": NUM_BLOCKS, "place": [1, "two"]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a stream of 30 entries, the last of which repeats the first block."""
    folder = tmp_path_factory.mktemp("exported")
    blocks = make_blocks(NUM_BLOCKS - 1)
    with open_store(folder / "store") as store:
        store.create_stream(HEADER)
        store.append("lecture", [*blocks, renumbered(blocks[0], NUM_BLOCKS - 1)], CURSOR)
        store.flush()
        report = _export(store, folder / "file")
    assert (report.num_entries, report.num_blocks, report.missing) == (NUM_BLOCKS, NUM_BLOCKS - 1, [])
    assert report.nbytes == (folder / "file").stat().st_size
    return folder / "file"


def _export(store: Store, path: Path, name: str = "lecture") -> ExportReport:
    return export_stream(store._disk, store._pool, name, path)


def _import(store: Store, path: Path, name: str | None = None) -> ImportReport:
    return import_stream(store._disk, store._pool, path, name)


def _check(store: Store, name: str = "lecture") -> None:
    manifest = store.manifest(name)
    assert manifest.header == replace(HEADER, name=name)
    assert manifest.cursor == CURSOR
    blocks = make_blocks(NUM_BLOCKS - 1)
    assert list(manifest.entries) == [
        *(block.entry for block in blocks),
        renumbered(blocks[0], NUM_BLOCKS - 1).entry,
    ]
    assert store.summaries(name, 0, NUM_BLOCKS) == {
        index: f"summary {index % (NUM_BLOCKS - 1)}".encode() for index in range(NUM_BLOCKS)
    }
    requests = [FetchRequest(entry.key, empty_slot()) for entry in manifest.entries]
    assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
    for index, request in enumerate(requests):
        assert same_block(request.slot, make_slot(index % (NUM_BLOCKS - 1)))
    assert store.verify().is_clean


def test_a_stream_goes_from_store_to_store_bit_for_bit(tmp_path: Path, exported: Path) -> None:
    with open_store(tmp_path / "there") as store:
        report = _import(store, exported)
        assert (report.header, report.num_entries, report.num_blocks) == (HEADER, NUM_BLOCKS, NUM_BLOCKS - 1)
        assert (report.is_new, report.missing) == (True, [])
        _check(store)
        _export(store, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == exported.read_bytes()
        store.append("lecture", [renumbered(make_blocks(1, 5)[0], NUM_BLOCKS)], CURSOR)
        store.flush()


def test_a_stream_can_come_under_another_name_and_shares_its_blocks(tmp_path: Path, exported: Path) -> None:
    with open_store(tmp_path / "there") as store:
        _import(store, exported)
        used = store.stats().usage.extent_used_nbytes
        _import(store, exported, "copy")
        assert store.stats().usage.extent_used_nbytes == used
        _check(store, "copy")
        store.remove_stream("lecture")
        _check(store, "copy")
        assert not _import(store, exported, "copy").is_new, "a second import of the same changes nothing"
        _check(store, "copy")


def test_another_stream_of_that_name_is_left_alone(tmp_path: Path, exported: Path) -> None:
    with open_store(tmp_path / "there") as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(2), {"next": 2})
        store.flush()
        with pytest.raises(ConfigError, match="another one"):
            _import(store, exported)
        assert store.manifest("lecture").cursor == {"next": 2}
        assert store.verify().is_clean


def test_an_import_that_was_killed_is_finished_by_the_next_one(tmp_path: Path, exported: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(exported.read_bytes()[: exported.stat().st_size * 2 // 3])
    with open_store(tmp_path / "there") as store:
        with pytest.raises(CorruptRecordError, match="cut off"):
            _import(store, cut)
        assert store.streams() == []
        assert store.verify().is_clean
        _import(store, exported)
        _check(store)


def test_an_import_brings_back_what_a_repair_dropped(tmp_path: Path, exported: Path) -> None:
    with open_store(tmp_path / "there") as store:
        _import(store, exported)
        (damaged,) = RecordTransfer(store._disk, store._pool).read([block_key(7)])
        assert damaged is not None
        with (tmp_path / "there" / "extents" / "00000000.extents").open("r+b") as file:
            file.seek(7 * EXTENT_NBYTES + 1000)
            file.write(bytes(1000))
        assert list(Repairer(store._disk, store._pool).run().dropped) == [block_key(7)]
        report = _export(store, tmp_path / "partial")
        assert report.missing == [block_key(7)]
        assert not _import(store, exported).is_new
        _check(store)
    with open_store(tmp_path / "third") as store:
        assert _import(store, tmp_path / "partial").missing == [block_key(7)]
        assert [fault.index for fault in store.verify().faults] == [7]
        assert _import(store, exported).missing == []
        _check(store)


def test_a_store_without_room_refuses_and_has_no_stream(tmp_path: Path, exported: Path) -> None:
    with open_store(tmp_path / "there", disk_nbytes=(1 << 19) + 10 * EXTENT_NBYTES) as store:
        with pytest.raises(CapacityError):
            _import(store, exported)
        assert store.streams() == []
        assert store.verify().is_clean


def test_what_cannot_be_read_or_written_is_said_and_leaves_no_file(tmp_path: Path, exported: Path) -> None:
    with open_store(tmp_path / "there") as store:
        for path in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(StoreIOError):
                _import(store, path)
        with pytest.raises(StreamNotFoundError):
            _export(store, tmp_path / "file")
        _import(store, exported)
        with pytest.raises(StoreIOError):
            _export(store, tmp_path / "no such folder" / "file")
    assert not list(tmp_path.glob("file*"))
    with open_store(tmp_path / "there", Access.READ) as store:
        _export(store, tmp_path / "file")
        with pytest.raises(ReadOnlyError):
            _import(store, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == exported.read_bytes()


def test_no_damaged_byte_goes_unnoticed(tmp_path: Path, exported: Path) -> None:
    """Flips, cuts and swaps at random: an error of a known kind, or the very same stream."""
    whole = exported.read_bytes()
    with open_store(tmp_path / "there") as store:
        for seed in range(150):
            rng = random.Random(seed)
            data = bytearray(whole)
            match seed % 3:
                case 0:
                    data[rng.choice((rng.randrange(len(data)), rng.randrange(600)))] ^= 1 << rng.randrange(8)
                case 1:
                    del data[rng.randrange(len(data)) :]
                case _:
                    at = rng.randrange(len(data))
                    data[at:at] = rng.randbytes(rng.randint(1, 64))
            (tmp_path / "file").write_bytes(data)
            try:
                _import(store, tmp_path / "file")
            except KVStoreError:
                assert store.streams() == []
                continue
            _check(store)  # the byte belonged to nothing: the minor version
            store.remove_stream("lecture")
        assert store.verify().is_clean


def _container(*chunks: tuple[bytes, bytes], major: int = 1) -> bytes:
    body = b"".join(struct.pack("<4sIQ", kind, crc32c(payload), len(payload)) + payload for kind, payload in chunks)
    end = struct.pack("<Q", len(chunks))
    return struct.pack("<4sHH", b"KVXP", major, 0) + body + struct.pack("<4sIQ", b"DONE", crc32c(end), 8) + end


_STATE = struct.pack("<BxxxIQQ", 1, 2, 1, 40) + b"{}"
_HEAD = (b"HEAD", HEADER.to_json())


def _entry(key: bytes, num_tokens: int = 40, start_s: float = 0.0) -> tuple[bytes, bytes]:
    return b"ENTR", struct.pack("<BxxxI32sQddq", 1, num_tokens, key, 0, start_s, 1.0, 0) + b"\0"


HOSTILE = [
    b"",
    b"KVXP",
    _container(),
    _container(_HEAD),
    _container((b"HEAD", b"{}"), (b"STAT", _STATE)),
    _container((b"HEAD", b"[" * 100_000), (b"STAT", _STATE)),
    _container(_HEAD, (b"STAT", b"")),
    _container(_HEAD, (b"STAT", _STATE)),
    _container(_HEAD, (b"STAT", struct.pack("<BxxxIQQ", 1, 2, 1 << 60, 40) + b"{}"), _entry(bytes(32))),
    _container(_HEAD, (b"STAT", struct.pack("<BxxxIQQ", 1, 1, 1, 40) + b"["), _entry(bytes(32))),
    _container(_HEAD, (b"STAT", _STATE), (b"BLCK", b"")),
    _container(_HEAD, (b"STAT", _STATE), (b"BLCK", bytes(36) + b"x" * 4096)),
    _container(_HEAD, (b"STAT", _STATE), (b"CALI", b"x" * 100)),
    _container(_HEAD, (b"STAT", _STATE), (b"DECI", b"{}")),
    _container(_HEAD, (b"STAT", _STATE), (b"ENTR", b"")),
    _container(_HEAD, (b"STAT", _STATE), _entry(bytes(32), 41)),
    _container(_HEAD, (b"STAT", _STATE), _entry(bytes(32), start_s=float("nan"))),
    _container(_HEAD, (b"STAT", _STATE), _entry(bytes(32)), _entry(bytes(32))),
    _container(_HEAD, (b"STAT", _STATE), _entry(bytes(32)), (b"BLCK", b"")),
    struct.pack("<4sHH", b"KVXP", 1, 0) + struct.pack("<4sIQ", b"BLCK", 0, 1 << 62),
    struct.pack("<4sHH", b"KVXP", 1, 0) + struct.pack("<4sIQ", b"HEAD", 0, 1 << 20),
]


@pytest.mark.parametrize("data", HOSTILE)
def test_a_hostile_file_makes_no_stream(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with open_store(tmp_path / "there") as store:
        with pytest.raises(CorruptRecordError):
            _import(store, tmp_path / "file")
        assert store.streams() == []
        with store._disk.catalogue.read() as view:
            assert view.count(Table.BLOCKS) == view.count(Table.CALIBRATIONS) == 0


def test_blocks_of_another_model_are_refused(tmp_path: Path, exported: Path) -> None:
    other = replace(HEADER, spec=replace(HEADER.spec, num_layers=4))
    data = exported.read_bytes()
    nbytes = len(HEADER.to_json())
    assert data[24 : 24 + nbytes] == HEADER.to_json()
    header = struct.pack("<4sIQ", b"HEAD", crc32c(other.to_json()), len(other.to_json())) + other.to_json()
    (tmp_path / "file").write_bytes(data[:8] + header + data[24 + nbytes :])
    with open_store(tmp_path / "there") as store, pytest.raises(CorruptRecordError, match="not of the stream's model"):
        _import(store, tmp_path / "file")


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_container(major=2))
    with open_store(tmp_path / "there") as store, pytest.raises(UnsupportedFormatError, match=r"2\.0"):
        _import(store, tmp_path / "file")


def test_a_file_of_the_old_name_gives_way_only_to_a_whole_one(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with open_store(tmp_path / "there") as store:
        with pytest.raises(StreamNotFoundError):
            _export(store, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == b"old"
        _import(store, exported)
        _export(store, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == exported.read_bytes()
