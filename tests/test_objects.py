# SPDX-License-Identifier: Apache-2.0
"""Objects of streams: put behind appends, read in parts, replaced, shared by forks, dropped by rollbacks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.errors import (
    ConfigError,
    ReadOnlyError,
    StreamNotFoundError,
)
from kvstore.store import Access, NewObject, ObjectEntry, Store
from kvstore.tiers.catalogue import Table
from tests.store_blocks import EXTENT_NBYTES, HEADER, make_blocks, open_store

PAGE = 4096


def data(number: int, nbytes: int) -> bytes:
    """Random bytes, always the same for one number."""
    return hashlib.shake_256(number.to_bytes(8, "little")).digest(nbytes)


def new(index: int, num_blocks: int, *sizes: int, kind: str = "index", seed: int = 0) -> NewObject:
    """An object of parts of these sizes."""
    return NewObject(kind, index, num_blocks, [data(1000 * index + at + seed, size) for at, size in enumerate(sizes)])


def stream(store: Store, count: int, *objects: NewObject) -> None:
    """Stream `lecture` of so many blocks, with objects."""
    store.create_stream(HEADER)
    store.append("lecture", make_blocks(count), {"next": count})
    store.put_objects("lecture", objects)
    store.flush()


def read(store: Store, each: NewObject, name: str = "lecture") -> bool:
    """Whether a stream has this object, bit for bit."""
    return store.read_object(name, each.kind, each.index) == list(each.parts)


SIZES = (1, 0, PAGE - 100, PAGE, PAGE + 1, 3 << 20, 0, 7)


def test_parts_come_back_alone_and_together_in_any_process(tmp_path: Path) -> None:
    one, many = new(0, 2, *SIZES), new(5, 0, *([33] * 3000), kind="a.b:c_d-9")
    with open_store(tmp_path) as store:
        stream(store, 2, one, many)
        assert store.objects("lecture", "index") == [ObjectEntry(0, 2, SIZES)]
        assert store.objects("lecture", "a.b:c_d-9") == [ObjectEntry(5, 0, (33,) * 3000)]
        assert store.objects("lecture", "index2") == []
        assert store.verify().is_clean
    with Store.open(tmp_path, access=Access.READ) as store:  # without a layout
        assert read(store, one)
        assert read(store, many)
        wanted = [7, 0, 0, 5, 8]
        parts = [*one.parts, None]
        assert store.read_object("lecture", "index", 0, wanted) == [parts[part] for part in wanted]
        assert store.read_objects("lecture", "index", [(1, [0, 1]), (0, [2]), (1, None), (0, [])]) == [
            [None, None],
            [one.parts[2]],
            [],
            [],
        ]


def test_only_the_pages_of_the_parts_are_read(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        stream(store, 1, new(0, 1, *[100_000] * 100))
        before = store.stats().disk.read_nbytes
        assert None not in store.read_object("lecture", "index", 0, [3, 50, 51])
        assert 300_000 <= store.stats().disk.read_nbytes - before <= 300_000 + 5 * PAGE


def test_an_object_takes_the_place_of_one_of_its_kind_and_index(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        stream(store, 2, new(0, 1, 9000), new(1, 1, 10), new(0, 1, 10, kind="other"))
        newer = new(0, 2, 20, 30, seed=9)
        store.put_objects("lecture", [new(0, 2, 5), newer])
        store.flush()
        assert read(store, newer)
        assert [entry.index for entry in store.objects("lecture", "index")] == [0, 1]
        assert store.stats().usage.extent_used_nbytes == 2 * EXTENT_NBYTES + 3 * PAGE
        assert store.drop_objects("lecture", "index") == 2
        assert store.objects("lecture", "index") == []
        assert read(store, new(0, 1, 10, kind="other"))
        assert store.verify().is_clean


@pytest.mark.parametrize("at", [None, 0, 40, 80])
def test_a_fork_has_the_objects_that_its_blocks_bear(tmp_path: Path, at: int | None) -> None:
    objects = [new(index, index, 5000) for index in range(4)]
    with open_store(tmp_path) as store:
        stream(store, 3, *objects)
        used = store.stats().usage.extent_used_nbytes
        store.fork("lecture", "other", at)
        shared = 3 if at is None else at // 40
        assert store.stats().usage.extent_used_nbytes == used
        assert [entry.index for entry in store.objects("other", "index")] == list(range(shared + 1))
        assert store.verify().is_clean
        store.put_objects("lecture", [new(0, 0, 7)])
        assert store.remove_stream("lecture") > 0
        assert all(read(store, each, "other") for each in objects[: shared + 1])
        assert store.verify().is_clean
        store.remove_stream("other")
        assert store.stats().usage.extent_used_nbytes == 0
        assert store.verify().is_clean


def test_a_rollback_drops_what_describes_more_than_is_left(tmp_path: Path) -> None:
    objects = [new(index, index, 5000) for index in range(4)]
    with open_store(tmp_path) as store:
        stream(store, 3, *objects)
        assert store.rollback("lecture", 40) == 2 * EXTENT_NBYTES + 2 * 2 * PAGE
        assert [entry.index for entry in store.objects("lecture", "index")] == [0, 1]
        assert store.verify().is_clean


def test_objects_follow_the_appends_before_them(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        for number in range(20):
            store.append("lecture", make_blocks(1, number), {})
            store.put_objects("lecture", [new(number, number + 1, 100)])
        with pytest.raises(ConfigError, match="describes 21 blocks; the stream has 20"):
            store.put_objects("lecture", [new(0, 21, 1)])
        store.flush()
        assert len(store.objects("lecture", "index")) == 20


BAD = [
    NewObject("", 0, 0, [b""]),
    NewObject("a" * 65, 0, 0, [b""]),
    NewObject("A", 0, 0, [b""]),
    NewObject("a\0", 0, 0, [b""]),
    NewObject("a", -1, 0, [b""]),
    NewObject("a", 1 << 63, 0, [b""]),
    NewObject("a", 0, -1, [b""]),
    NewObject("a", 0, 0, []),
    NewObject("a", 0, 0, [b""] * 65537),
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_what_is_out_of_range_is_refused_before_it_is_queued(tmp_path: Path, bad: NewObject) -> None:
    with open_store(tmp_path) as store:
        store.create_stream(HEADER)
        with pytest.raises(ConfigError):
            store.put_objects("lecture", [bad])
        store.flush()


def test_calls_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        stream(store, 1, new(0, 0, 5))
        for refused in ("put_objects", "drop_objects"):
            with pytest.raises(StreamNotFoundError):
                getattr(store, refused)("nobody", [] if refused == "put_objects" else "index")
        with pytest.raises(StreamNotFoundError):
            store.objects("nobody", "index")
        with pytest.raises(StreamNotFoundError):
            store.read_object("nobody", "index", 0)
        with pytest.raises(ConfigError):
            store.read_object("lecture", "index", 0, [-1])
        with pytest.raises(ConfigError):
            store.read_object("lecture", "in/dex", 0)
        memory = memoryview(bytearray(b"before"))
        store.put_objects("lecture", [NewObject("index", 1, 0, [memory])])
        memory[:] = b"after!"
        store.flush()
        assert store.read_object("lecture", "index", 1) == [b"before"]
    with open_store(tmp_path, Access.READ) as store, pytest.raises(ReadOnlyError):
        store.put_objects("lecture", [new(0, 0, 5)])


def _damage(path: Path, needle: bytes) -> None:
    """Flip a bit of the extent files where `needle` lies."""
    (file,) = (path / "extents").glob("*.extents")
    at = file.read_bytes().index(needle)
    with file.open("r+b") as extents:
        extents.seek(at)
        extents.write(bytes([needle[0] ^ 1]))


def test_a_damaged_part_costs_itself_alone(tmp_path: Path) -> None:
    one = new(0, 0, 5000, 6000, 7000, 3 << 20)
    with open_store(tmp_path) as store:
        stream(store, 1, one)
    _damage(tmp_path, bytes(one.parts[1])[2000:2032])
    _damage(tmp_path, bytes(one.parts[3])[2 << 20 : (2 << 20) + 32])
    with open_store(tmp_path) as store:
        assert store.read_object("lecture", "index", 0) == [one.parts[0], None, one.parts[2], None]


@pytest.mark.parametrize("sizes", [(100, 200), (1,) * 1000], ids=["short", "long"])
def test_damaged_rows_are_misses(tmp_path: Path, sizes: Sequence[int]) -> None:
    with open_store(tmp_path) as store:
        stream(store, 1, new(0, 0, *sizes), new(1, 0, *sizes))
        catalogue = store._disk.catalogue
        with catalogue.read() as view:
            key, value = next(view.scan(Table.META, prefix=b"object "))

        def put(value: bytes) -> None:
            catalogue.write(lambda view: view.put(Table.META, key, value))

        for at in range(0, len(value), 3):
            wrong = value[:at] + bytes([value[at] ^ 4]) + value[at + 1 :]
            put(wrong)
            assert store.read_object("lecture", "index", 0, [0]) == [None]
            assert [entry.index for entry in store.objects("lecture", "index")] == [1]
        for wrong in (b"", value[:10], value + b"\0"):
            put(wrong)
            assert store.read_object("lecture", "index", 0) == []
        store.remove_stream("lecture")  # a damaged row goes with its stream
        with catalogue.read() as view:
            assert not list(view.scan(Table.META, prefix=b"object "))


def test_a_reader_beside_a_writer_sees_the_old_object_or_the_new_one(tmp_path: Path) -> None:
    versions = [new(0, 0, *[seed * 700] * 8, seed=seed) for seed in range(1, 40)]
    with open_store(tmp_path) as store, ThreadPoolExecutor(1) as thread:
        stream(store, 1, versions[0])

        def write() -> None:
            for each in versions[1:]:
                store.put_objects("lecture", [each])
                store.flush()

        writing = thread.submit(write)
        while not writing.done():
            parts = store.read_object("lecture", "index", 0)
            if parts and None not in parts:  # three looks may all be too late
                assert parts in [each.parts for each in versions]
        writing.result()
        assert read(store, versions[-1])
        assert store.stats().usage.extent_used_nbytes == EXTENT_NBYTES + 54 * PAGE
        assert (store.stats().num_blocks, store.stats().num_objects) == (1, 1)


def test_verify_names_damaged_and_missing_objects(tmp_path: Path) -> None:
    one = new(3, 0, 5000, 6000)
    with open_store(tmp_path) as store:
        stream(store, 1, one, new(4, 1, 10))
    _damage(tmp_path, bytes(one.parts[1])[2000:2032])
    with open_store(tmp_path) as store:
        for report in (store.verify(), store.verify("lecture")):
            (fault,) = report.faults
            assert (fault.stream, fault.index) == ("lecture", None)
            assert fault.reason.startswith("object index 3: ")
            assert not report.structure
