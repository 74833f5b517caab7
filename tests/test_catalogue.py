# SPDX-License-Identifier: Apache-2.0
"""The catalogue's environment: transactions, growth, processes, damaged files, versions."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvstore
from kvstore.errors import (
    BusyError,
    CapacityError,
    CorruptRecordError,
    KVStoreError,
    ReadOnlyError,
    StoreNotFoundError,
    UnsupportedFormatError,
)
from kvstore.tiers.catalogue import Catalogue, Table, WriteView
from kvstore.tiers.tables.meta import begin_epoch, check_format


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    opened = Catalogue(tmp_path, writable=True, durable=False)
    yield opened
    opened.close()


def _fill(view: WriteView) -> None:
    for number in range(250):
        view.put(Table.META, bytes([number]), bytes(9000))


def _child(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(kvstore.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_transaction_that_raises_leaves_nothing(catalogue: Catalogue) -> None:
    def work(view: WriteView) -> None:
        view.put(Table.META, b"a", b"1")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        catalogue.write(work)
    with catalogue.read() as view:
        assert view.get(Table.META, b"a") is None


def test_the_map_grows_with_its_content(catalogue: Catalogue) -> None:
    def work(view: WriteView) -> None:
        for number in range(24):
            view.put(Table.META, bytes([number]), bytes(1 << 20))

    catalogue.write(work)
    with catalogue.read() as view:
        assert view.count(Table.META) == 24


def test_a_full_catalogue_is_a_capacity_error_and_stays_usable(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, writable=True, durable=False, max_map_nbytes=1 << 20)
    catalogue.write(lambda view: view.put(Table.META, b"kept", b"1"))
    with pytest.raises(CapacityError, match="limit"):
        catalogue.write(lambda view: view.put(Table.META, b"big", bytes(2 << 20)))
    catalogue.write(lambda view: view.put(Table.META, b"small", b"2"))
    with catalogue.read() as view:
        assert [view.get(Table.META, key) for key in (b"kept", b"big", b"small")] == [b"1", None, b"2"]
    catalogue.close()


def test_a_reader_follows_when_another_process_grows_the_map(tmp_path: Path) -> None:
    Catalogue(tmp_path, writable=True, durable=False).close()
    grow = (
        "import sys, pathlib\n"
        "from kvstore.tiers.catalogue import Catalogue, Table\n"
        "c = Catalogue(pathlib.Path(sys.argv[1]), writable=True, durable=False)\n"
        "c.write(lambda v: [v.put(Table.META, bytes([n]), bytes(1 << 20)) for n in range(40)])\n"
        "c.close()\n"
    )
    reader = Catalogue(tmp_path, writable=False, durable=False)
    with reader.read() as view:
        assert view.count(Table.META) == 0
    child = _child(grow, str(tmp_path))
    child.communicate(timeout=60)
    assert child.returncode == 0
    with reader.read() as view:
        assert view.get(Table.META, b"\x27") == bytes(1 << 20)
    reader.close()


def test_a_second_open_in_one_process_is_refused(tmp_path: Path, catalogue: Catalogue) -> None:
    with pytest.raises(BusyError, match="this process"):
        Catalogue(tmp_path, writable=False, durable=False)


def test_a_forked_child_is_refused(catalogue: Catalogue) -> None:
    child = os.fork()
    if child == 0:
        try:
            catalogue.write(lambda view: view.put(Table.META, b"a", b"1"))
        except BusyError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    Catalogue(tmp_path, writable=True, durable=False).close()
    reader = Catalogue(tmp_path, writable=False, durable=False)
    with pytest.raises(ReadOnlyError):
        reader.write(lambda view: view.put(Table.META, b"a", b"1"))
    reader.close()


@pytest.mark.parametrize("writable", [True, False])
def test_a_foreign_file_is_corrupt(tmp_path: Path, writable: bool) -> None:
    (tmp_path / "data.mdb").write_bytes(b"no catalogue" * 1000)
    with pytest.raises(CorruptRecordError):
        Catalogue(tmp_path, writable=writable, durable=False)


def test_a_catalogue_that_is_cut_short_is_corrupt_before_anything_is_mapped_away(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, writable=True, durable=False)
    catalogue.write(_fill)
    catalogue.close()
    os.truncate(tmp_path / "data.mdb", 4096 * 20)
    with pytest.raises(CorruptRecordError, match="cut short"):
        Catalogue(tmp_path, writable=False, durable=False)


def _missing_nbytes(catalogue: Catalogue) -> int:
    """Bytes between the end of the file and the end of the pages that LMDB has handed out."""
    return (catalogue._env.info()["last_pgno"] + 1) * 4096 - catalogue.nbytes


def _churn_until_pages_are_missing(catalogue: Catalogue) -> None:
    rng = random.Random(3)
    keys: list[bytes] = []

    def churn(view: WriteView) -> None:
        for _ in range(rng.choice([1, 5, 40])):
            if keys and rng.random() < 0.5:
                view.delete(Table.META, keys.pop(rng.randrange(len(keys))))
            else:
                keys.append(rng.randbytes(6))
                view.put(Table.META, keys[-1], bytes(rng.choice([100, 1500, 9000])))

    for _ in range(300):
        catalogue.write(churn)
        if _missing_nbytes(catalogue) > 0:
            return
    pytest.fail("LMDB wrote every page")


@pytest.mark.parametrize("writable", [True, False])
def test_pages_that_lmdb_had_no_need_to_write_are_not_missed(tmp_path: Path, writable: bool) -> None:
    catalogue = Catalogue(tmp_path, writable=True, durable=False)
    _churn_until_pages_are_missing(catalogue)
    with catalogue.read() as view:
        content = list(view.scan(Table.META))
    catalogue.close()
    catalogue = Catalogue(tmp_path, writable=writable, durable=False)
    assert (_missing_nbytes(catalogue) == 0) is writable
    with catalogue.read() as view:
        assert list(view.scan(Table.META)) == content
    catalogue.close()


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        Catalogue(tmp_path, writable=False, durable=False)


def test_numbers_of_later_writers_are_larger(catalogue: Catalogue) -> None:
    first = catalogue.write(lambda view: begin_epoch(view, 0.0))
    assert catalogue.write(lambda view: begin_epoch(view, 0.0)) >= first + (1 << 32)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (b"KVXS\x02\x00\x00\x00" + bytes(8), UnsupportedFormatError),
        (b"KVXS\x01\x00\x09\x00" + bytes(8), None),
        (b"what\x01\x00\x00\x00" + bytes(8), CorruptRecordError),
        (b"KVXS", CorruptRecordError),
    ],
)
def test_the_format_version_decides_who_may_read(
    catalogue: Catalogue, value: bytes, error: type[KVStoreError] | None
) -> None:
    catalogue.write(lambda view: view.put(Table.META, b"format", value))
    with catalogue.read() as view:
        if error is None:
            check_format(view)
        else:
            with pytest.raises(error):
                check_format(view)
