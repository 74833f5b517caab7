# SPDX-License-Identifier: Apache-2.0
"""Objects of streams where a store is kept in order: compaction, repair, export and import, a full disk."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import CapacityError, ConfigError, CorruptRecordError
from kvstore.native import crc32c
from kvstore.store import Durability, NewObject, Outcome, Store
from kvstore.tiers.catalogue import Catalogue, Table, WriteView
from kvstore.tiers.upkeep.compact import Compactor
from kvstore.tiers.upkeep.export_stream import export_stream
from kvstore.tiers.upkeep.import_stream import import_stream
from kvstore.tiers.upkeep.repair import Repairer, RepairReport
from tests.store_blocks import EXTENT_NBYTES, HEADER, block_key, make_blocks, make_slot, open_store
from tests.test_objects import PAGE, data, new, read, stream

OBJECTS = [new(0, 1, 5000), new(1, 2, *[10] * 1000), new(2, 4, 100_000), new(0, 4, 8, kind="state")]


def _filled(path: Path) -> Store:
    """Four blocks and `OBJECTS`."""
    store = open_store(path, durability=Durability.NONE)
    stream(store, 4, *OBJECTS)
    return store


def test_compaction_moves_objects_and_readers_find_them(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([block_key(number) for number in range(20, 40)], [make_slot(9)] * 20, [40] * 20)
        stream(store, 4, *OBJECTS)
        assert read(store, OBJECTS[1])  # remembers where its parts are
        store.remove([block_key(number) for number in range(20, 40)])
        report = Compactor(store._disk, store._pool).run()
        assert report.moved_blocks >= 8
        assert report.after_nbytes <= store.stats().usage.extent_used_nbytes + EXTENT_NBYTES
        assert all(read(store, each) for each in OBJECTS)
        assert store.verify().is_clean


def test_an_object_that_is_moved_meanwhile_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        store.put([block_key(20)], [make_slot(9)], [40])
        stream(store, 4, *OBJECTS)
        store.remove([block_key(20)])
        bodies = store._object_reader()._bodies
        read = bodies.read

        def moving(*args: Any) -> Any:
            monkeypatch.setattr(bodies, "read", read)  # once
            Compactor(store._disk, store._pool).run()
            store.put_objects("lecture", [new(index, 0, 3000) for index in range(5, 30)])  # where the table was
            store.flush()
            return read(*args)

        monkeypatch.setattr(bodies, "read", moving)
        assert [entry.index for entry in store.objects("lecture", "index")] == [0, 1, 2, *range(5, 30)]


def test_a_full_store_evicts_blocks_and_never_objects(tmp_path: Path) -> None:
    with open_store(tmp_path, disk_nbytes=2 << 20) as store:
        stream(store, 1, *[new(index, 0, 100_000) for index in range(8)])
        for number in range(100, 150):
            assert store.put([block_key(number)], [make_slot(9)], [40]) == [Outcome.STORED]
        assert all(read(store, new(index, 0, 100_000)) for index in range(8))
        store.put_objects("lecture", [new(8, 0, 400_000)])  # evicts
        store.flush()
        assert read(store, new(8, 0, 400_000))
        used = store.stats().usage.extent_used_nbytes
        store.put_objects("lecture", [new(9, 0, 10), new(0, 0, 3 << 20)])
        with pytest.raises(CapacityError):
            store.flush()
        assert read(store, new(0, 0, 100_000))  # all of a call, or nothing
        assert [entry.index for entry in store.objects("lecture", "index")] == list(range(9))
        assert store.stats().usage.extent_used_nbytes <= used
        assert store.verify().is_clean


def test_what_can_be_made_again_is_left_out_where_there_is_no_room(tmp_path: Path) -> None:
    with open_store(tmp_path, disk_nbytes=2 << 20) as store:
        stream(store, 1)
        store.put_objects("lecture", [new(0, 0, 3 << 20)], may_drop=True)
        store.put_objects("lecture", [new(1, 0, 1000)])
        store.flush()  # and nobody is told off for it
        assert [entry.index for entry in store.objects("lecture", "index")] == [1]
        assert store.verify().is_clean


def _repair(path: Path) -> RepairReport:
    """Repair; afterwards all is well, and a second repair finds nothing to do."""
    with open_store(path, durability=Durability.NONE) as store:
        report = Repairer(store._disk, store._pool).run()
        assert store.verify().is_clean
        assert not Repairer(store._disk, store._pool).run().has_changed
    return report


def test_repair_drops_a_damaged_object_and_keeps_the_others(tmp_path: Path) -> None:
    _filled(tmp_path).close()
    assert not _repair(tmp_path).has_changed
    with (tmp_path / "extents" / "00000000.extents").open("r+b") as file:
        file.seek(file.read().index(data(2000, 100_000)[500:600]))
        file.write(b"damage")
    report = _repair(tmp_path)
    assert len(report.dropped) == 1
    assert report.mended[0] == "stream 'lecture': object index 2 was damaged and is dropped"
    with open_store(tmp_path) as store:
        assert [read(store, each) for each in OBJECTS] == [True, True, False, True]
        assert store.stats().usage.extent_used_nbytes == 4 * EXTENT_NBYTES + (2 + 5 + 1) * PAGE


def test_damaged_rows_of_objects_are_repaired(tmp_path: Path) -> None:
    _filled(tmp_path).close()
    rng = random.Random(1)

    def damage(view: WriteView) -> None:
        rows = [(Table.META, *row) for row in view.scan(Table.META, prefix=b"object ")]
        bodies = {value[16:48] for _, _, value in rows}
        rows += [(Table.BLOCKS, key, value) for key, value in view.scan(Table.BLOCKS) if key in bodies]
        rows.append((Table.META, rows[0][1][:15] + b"\xff" + rows[0][1][16:], rows[0][2]))  # of no stream
        for table, key, value in rng.sample(rows, 2):
            # A block in a file that is not there is left alone: the file may come back.
            at = rng.choice([at for at in range(len(value)) if table is Table.META or at not in range(8, 12)])
            choices = [value[:at], value[:at] + bytes([value[at] ^ 1 << rng.randrange(8)]) + value[at + 1 :]]
            view.put(table, key, rng.choice(choices))

    for _ in range(12):
        catalogue = Catalogue(tmp_path / "catalogue", writable=True, durable=False)
        catalogue.write(damage)
        catalogue.close()
        _repair(tmp_path)
        with open_store(tmp_path, durability=Durability.NONE) as store:
            kept = {each.index for each in store.objects("lecture", "index")}
            assert all(read(store, each) for each in OBJECTS if each.kind == "index" and each.index in kept)
            lost = [each for each in OBJECTS if not read(store, each)]
            store.put_objects("lecture", lost)
            store.flush()
            assert all(read(store, each) for each in OBJECTS)
            assert store.verify().is_clean


def _export(store: Store, path: Path) -> Path:
    assert export_stream(store._disk, store._pool, "lecture", path).num_objects == len(store_objects(store))
    return path


def store_objects(store: Store) -> list[tuple[str, int, int]]:
    """Kind, index and blocks of all objects of the stream."""
    kinds = ("index", "state")
    return [(kind, each.index, each.num_blocks) for kind in kinds for each in store.objects("lecture", kind)]


def test_objects_travel_with_their_stream(tmp_path: Path) -> None:
    with _filled(tmp_path / "here") as store:
        wanted = store_objects(store)
        file = _export(store, tmp_path / "file")
    with open_store(tmp_path / "there") as store:
        assert import_stream(store._disk, store._pool, file).num_objects == 4
        assert store_objects(store) == wanted
        assert all(read(store, each) for each in OBJECTS)
        assert store.verify().is_clean
        store.drop_objects("lecture", "index")
        store.put_objects("lecture", [new(1, 0, 77)])
        store.flush()
        assert not import_stream(store._disk, store._pool, file).is_new  # brings back what it lacks, and no more
        assert [read(store, each) for each in OBJECTS] == [True, False, True, True]
        assert read(store, new(1, 0, 77))
        assert store.verify().is_clean
        store.remove_stream("lecture")
        assert store.stats().usage.extent_used_nbytes <= 6 * PAGE  # the body that was not taken may be evicted


def _end_of_stream(file: bytes) -> int:
    """Where the first chunk behind the stream begins."""
    at = 8
    while file[at : at + 4] != b"DONE":
        at += 16 + struct.unpack_from("<Q", file, at + 8)[0]
    return at + 16 + 8


def _chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack("<4sIQ", kind, crc32c(payload), len(payload)) + payload


def test_objects_of_other_blocks_do_not_come_to_a_stream_of_the_same_length(tmp_path: Path) -> None:
    with _filled(tmp_path / "from") as store:
        export_stream(store._disk, store._pool, "lecture", tmp_path / "file")
    with open_store(tmp_path / "to", durability=Durability.NONE) as store:
        others = make_blocks(4)
        others[-1] = replace(others[-1], entry=replace(others[-1].entry, key=block_key(99)))
        store.create_stream(HEADER)
        store.append("lecture", others, {"next": 4})
        store.flush()
        with pytest.raises(ConfigError, match="another one"):
            import_stream(store._disk, store._pool, tmp_path / "file")
        assert [entry.key for entry in store.manifest("lecture").entries] == [each.entry.key for each in others]
        assert store.objects("lecture", "index") == store.objects("lecture", "state") == []
        assert store.verify().is_clean


def test_programs_of_other_versions_read_the_stream(tmp_path: Path) -> None:
    with _filled(tmp_path / "here") as store:
        whole = _export(store, tmp_path / "file").read_bytes()
        for kind in ("index", "state"):
            store.drop_objects("lecture", kind)
        assert _export(store, tmp_path / "without").read_bytes()[4:8] == struct.pack("<HH", 1, 0)
    end = _end_of_stream(whole)
    # A program of 1.0 goes by the major version, and reads as far as the end of the stream.
    old = whole[:6] + b"\0\0" + whole[8:]
    # One of a later version may write more kinds of chunks; the last one counts them.
    (count,) = struct.unpack("<Q", whole[-8:])
    later = whole[:end] + _chunk(b"NEXT", b"what") + whole[end:-24] + _chunk(b"LAST", struct.pack("<Q", count + 1))
    with open_store(tmp_path / "there") as store:
        for number, (file, num_objects) in enumerate([(old, 0), (later, 4)]):
            (tmp_path / "changed").write_bytes(file)
            report = import_stream(store._disk, store._pool, tmp_path / "changed", f"stream {number}")
            assert (report.num_entries, report.num_objects) == (4, num_objects)
            assert len(store.objects(f"stream {number}", "state")) == (num_objects > 0)


def _object_chunk(change: Callable[[bytes], bytes]) -> Callable[[bytes, int], bytes]:
    """Change the payload of the first object, checksum included."""

    def made(whole: bytes, end: int) -> bytes:
        nbytes = struct.unpack_from("<Q", whole, end + 8)[0]
        payload = whole[end + 16 : end + 16 + nbytes]
        return whole[:end] + _chunk(b"OBJT", change(payload)) + whole[end + 16 + nbytes :]

    return made


HOSTILE: list[Callable[[bytes, int], bytes]] = [
    lambda whole, end: whole[:end],
    lambda whole, end: whole[: end + 700],
    lambda whole, end: whole[:-24],
    lambda whole, end: whole[: end + 30] + b"x" + whole[end + 31 :],
    lambda whole, end: whole[:end] + whole[-24:],
    lambda whole, end: whole[:end] + struct.pack("<4sIQ", b"NEXT", 0, 1 << 60) + whole[end:],
    _object_chunk(lambda payload: b""),
    _object_chunk(lambda payload: b"\xff" + payload[1:60]),
    _object_chunk(lambda payload: payload[:8] + b"\xff" * 8 + payload[16:]),
    _object_chunk(lambda payload: payload[:16] + struct.pack("<Q", 5) + payload[24:]),
    _object_chunk(lambda payload: payload[:56] + b"INDEX" + payload[61:]),
    _object_chunk(lambda payload: payload[:-1] + bytes([payload[-1] ^ 1])),
    _object_chunk(lambda payload: payload + b"\0"),
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_a_file_with_damaged_objects_makes_no_stream(tmp_path: Path, change: Callable[[bytes, int], bytes]) -> None:
    with _filled(tmp_path / "here") as store:
        whole = _export(store, tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(change(whole, _end_of_stream(whole)))
    with open_store(tmp_path / "there") as store:
        with pytest.raises(CorruptRecordError):
            import_stream(store._disk, store._pool, tmp_path / "file")
        assert store.streams() == []
        assert store.verify().is_clean


def test_an_object_of_a_gib_and_a_byte_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(1), {})
        memory = memoryview(bytes(1 << 20))
        with pytest.raises(ValueError, match="cut what is larger"):
            store.put_objects("lecture", [NewObject("a", 0, 0, [memory] * 1024)])
