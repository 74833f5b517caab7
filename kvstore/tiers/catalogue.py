# SPDX-License-Identifier: Apache-2.0
"""The LMDB environment of a store: tables, transactions, growth, error mapping. The only importer of lmdb."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import lmdb

from kvstore.errors import (
    BusyError,
    CapacityError,
    CorruptRecordError,
    KVStoreError,
    ReadOnlyError,
    StoreIOError,
    StoreNotFoundError,
    UnsupportedFormatError,
)
from kvstore.tiers.gate import Gate
from kvstore.tiers.resident import MappedPages
from kvstore.tiers.room import FULL_ERRNOS, READ_ONLY_ERRNOS, describe_full, free_nbytes, reserve
from kvstore.tiers.tables.names import Table

__all__ = ["INITIAL_MAP_NBYTES", "MAX_MAP_NBYTES", "Catalogue", "ReadView", "Table", "WriteView"]

INITIAL_MAP_NBYTES = 16 << 20
MAX_MAP_NBYTES = 1 << 40
_MAX_READERS = 512
_LOCK_NBYTES = 192 + 64 * (_MAX_READERS - 1)  # as LMDB lays its lock file out
# LMDB never writes pages that one transaction took and gave back: an intact file may end a few pages early.
_MAX_UNWRITTEN_NBYTES = 1 << 20
# A write that the file system cut short is EIO to LMDB; with less room than this left, that is why.
_FULL_BELOW_NBYTES = 4 << 20

Result = TypeVar("Result")


class ReadView:
    """One snapshot of the tables; valid inside the `with` that made it. Returns copies, never map memory."""

    def __init__(self, txn: lmdb.Transaction[bytes], tables: dict[Table, lmdb._Database]) -> None:
        self._txn = txn
        self._tables = tables

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the value of `key`, or None."""
        return self._txn.get(key, db=self._tables[table])

    def get_many(self, table: Table, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return what there is of many keys."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            return dict(cursor.getmulti(keys))

    def scan(self, table: Table, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield key and value in key order, from `start` on, as long as keys begin with `prefix`."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if not cursor.set_range(max(start, prefix)):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value

    def scan_back(self, table: Table, before: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and value in reverse key order: from the last key, or the last one less than `before`."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if cursor.prev() if before is not None and cursor.set_range(before) else cursor.last():
                yield from cursor.iterprev()

    def keys(self, table: Table) -> list[bytes]:
        """Return all keys of `table` in order."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            return list(cursor.iternext(keys=True, values=False))

    def count(self, table: Table) -> int:
        """Return how many keys `table` holds."""
        return self._txn.stat(self._tables[table])["entries"]


class WriteView(ReadView):
    """The one write transaction: sees its own changes, commits when the function it was given to returns."""

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Insert or replace."""
        self._txn.put(key, value, db=self._tables[table])

    def put_many(self, table: Table, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Insert or replace many; fastest in the order of their keys."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            cursor.putmulti(rows)

    def delete(self, table: Table, key: bytes) -> bool:
        """Remove `key`; False when it was not there."""
        return self._txn.delete(key, db=self._tables[table])


class Catalogue:
    """Owns the environment: opened once per process, grows on demand, useless after a fork.

    Threads may read and write concurrently; writes wait for each other.

    Args:
        folder: exists; holds `data.mdb` and `lock.mdb`, which a writer creates.
        writable: open for writing.
        durable: sync every commit to the device.
        max_map_nbytes: the catalogue may grow to this size.

    Raises:
        StoreNotFoundError: a reader found no catalogue.
        BusyError: this process has it open already.
        ReadOnlyError: a writer lacks permission.
        CorruptRecordError: the file is not a catalogue, or is cut short.
        UnsupportedFormatError: made by another version of LMDB's file format.
        CapacityError: the file system has no room for the first pages.
        StoreIOError: the operating system refused.
    """

    def __init__(self, folder: Path, *, writable: bool, durable: bool, max_map_nbytes: int = MAX_MAP_NBYTES) -> None:
        self._folder = folder
        self._data_path = folder / "data.mdb"
        self._writable = writable
        self._max_map_nbytes = max_map_nbytes
        self._pid = os.getpid()
        self._gate = Gate()
        self.pages = MappedPages(self._gate, self._map_anew)
        if not writable and not self._data_path.exists():
            raise StoreNotFoundError(f"{folder}: no store here; create it by opening it for writing")
        is_new = writable and not self._data_path.exists()
        # A reader without write permission cannot register in the lock file; it goes without.
        if registers := writable or os.access(folder, os.W_OK):
            reserve(folder / "lock.mdb", _LOCK_NBYTES)
        with self._mapped_errors():
            try:
                self._env = lmdb.open(
                    str(folder),
                    map_size=min(INITIAL_MAP_NBYTES, max_map_nbytes) if writable else 0,
                    readonly=not writable,
                    create=writable,
                    sync=durable,
                    metasync=durable,
                    # Look-ups are random: read-ahead would fill the page cache with neighbours nobody asked for.
                    readahead=False,
                    max_dbs=len(Table),
                    max_readers=_MAX_READERS,
                    lock=registers,
                )
            except lmdb.Error:
                if is_new:  # on a full disk half of the first pages may be there, and would look like damage
                    self._data_path.unlink(missing_ok=True)
                raise
        try:
            if writable:
                self._env.reader_check()  # readers that were killed would pin old pages for ever
            self._check_length(writable)
            self._tables = self._open_tables(writable)
        except BaseException:
            self._env.close()
            raise

    @contextmanager
    def read(self) -> Iterator[ReadView]:
        """Open a snapshot for the length of a `with` block; keep it short, it pins old pages.

        Raises:
            BusyError: called in a forked child.
            CorruptRecordError, StoreIOError: the catalogue cannot be read.
        """
        self._check_process()
        with self._mapped_errors(), self._gate.visit() as visitor:
            txn = self._begin_read(visitor)
            try:
                yield ReadView(txn, self._tables)
            finally:
                txn.abort()
        self.pages.note_call()

    def write(self, work: Callable[[WriteView], Result]) -> Result:
        """Run `work` in the write transaction and commit; nothing is written when it raises.

        `work` is run again from the start when the map had to grow: it must change nothing but the view.

        Raises:
            CapacityError: the file system is full, or the catalogue reached its limit.
            ReadOnlyError: the catalogue was opened by a reader.
            BusyError: called in a forked child.
        """
        self._check_process()
        while True:
            try:
                with self._gate.visit() as visitor:
                    self._gate.enter(visitor)
                    with self._env.begin(write=True) as txn:
                        return work(WriteView(txn, self._tables))
            except lmdb.MapFullError as error:
                self._grow(error)
            except lmdb.MapResizedError:
                self._resize(0)
            except lmdb.Error as error:
                raise self._translated(error) from error

    @property
    def nbytes(self) -> int:
        """Bytes of the catalogue on disk."""
        return self._data_path.stat().st_size

    def close(self) -> None:
        """Wait for open transactions, then unmap. In a forked child: forget, the parent owns it."""
        if os.getpid() == self._pid:
            with self._gate.exclusive():
                self._env.close()

    def _open_tables(self, writable: bool) -> dict[Table, lmdb._Database]:
        try:
            with self._mapped_errors():
                if not writable:  # handles opened inside a read transaction would end with it
                    return {table: self._env.open_db(table.value, create=False) for table in Table}
                with self._env.begin(write=True) as txn:
                    return {table: self._env.open_db(table.value, txn=txn) for table in Table}
        except CorruptRecordError as error:
            raise StoreNotFoundError(f"{self._folder}: not a kvstore catalogue, a table is missing") from error

    def _check_length(self, writable: bool) -> None:
        """Refuse a file that was cut short: reading a mapped page behind its end kills the process with SIGBUS."""
        wanted = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if not 0 < self.nbytes < wanted:
            return
        if wanted - self.nbytes > _MAX_UNWRITTEN_NBYTES:
            raise CorruptRecordError(f"{self._data_path}: {self.nbytes} bytes, but its pages need {wanted}: cut short")
        if writable:
            # The store's lock is held, so nobody else lengthens the file; LMDB calls pages of zeros corrupt by itself.
            os.truncate(self._data_path, wanted)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise BusyError(
                f"{self._folder}: opened by process {self._pid}, used in its forked child {os.getpid()}; "
                "open the store again in the child"
            )

    def _begin_read(self, visitor: object) -> lmdb.Transaction[bytes]:
        """Enter the gate and begin; the caller leaves the gate, however this ends."""
        while True:
            self._gate.enter(visitor)
            try:
                return self._env.begin()
            except lmdb.MapResizedError:
                self._gate.leave(visitor)
                self._resize(0)
            except lmdb.ReadersFullError:
                self._gate.leave(visitor)
                if self._env.reader_check() == 0:
                    raise

    def _grow(self, cause: lmdb.Error) -> None:
        if (map_nbytes := self._env.info()["map_size"]) >= self._max_map_nbytes:
            raise CapacityError(
                f"{self._data_path}: full at its limit of {self._max_map_nbytes} bytes; remove streams or raise it"
            ) from cause
        self._resize(min(2 * map_nbytes, self._max_map_nbytes))

    def _resize(self, map_nbytes: int) -> None:
        """Map `map_nbytes`, or with 0 what another process grew it to; LMDB allows it only without transactions."""
        with self._mapped_errors(), self._gate.exclusive():
            self._env.set_mapsize(map_nbytes)

    def _map_anew(self) -> None:
        with suppress(lmdb.Error):  # closed meanwhile
            self._env.set_mapsize(self._env.info()["map_size"] if self._writable else 0)

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: lmdb.Error) -> KVStoreError:
        text = f"{self._folder}: {error}"
        if isinstance(error, lmdb.MapFullError):
            return CapacityError(text)
        free = free_nbytes(self._folder) if error.code == errno.EIO and self._writable else None
        if error.code in FULL_ERRNOS or (free is not None and free < _FULL_BELOW_NBYTES):
            return CapacityError(f"{self._folder}: {describe_full(self._folder)}")
        if isinstance(error, lmdb.VersionMismatchError):
            return UnsupportedFormatError(text)
        if isinstance(error, (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.NotFoundError)):
            return CorruptRecordError(text)
        if isinstance(error, lmdb.ReadonlyError) or error.code in READ_ONLY_ERRNOS:
            return ReadOnlyError(text)
        if error.code == errno.ENOENT:
            return StoreNotFoundError(text)
        if "already open in this process" in str(error):
            return BusyError(f"{self._folder}: this process has the store open already; share that object")
        return StoreIOError(text)
