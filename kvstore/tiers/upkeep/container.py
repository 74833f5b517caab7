# SPDX-License-Identifier: Apache-2.0
"""The file of an exported stream: chunks with checksums, in a fixed order; docs/file-format.md says what they hold."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.native import crc32c

MAJOR = 1
MINOR = 0

_MAGIC = b"KVXP"
_HEADER = struct.Struct("<4sHH")  # magic, major, minor
_CHUNK = struct.Struct("<4sIQ")  # kind, CRC32C of the payload, bytes of the payload


class Kind(Enum):
    """Kinds of chunks, in the order in which they come."""

    HEADER = b"HEAD"
    STATE = b"STAT"
    CALIBRATION = b"CALI"
    DECISION = b"DECI"
    BLOCK = b"BLCK"
    ENTRY = b"ENTR"
    END = b"DONE"


_ORDER = {kind: position for position, kind in enumerate(Kind)}
_MAX_NBYTES = {
    Kind.HEADER: 16 << 20,
    Kind.STATE: 16 << 20,
    Kind.CALIBRATION: 1 << 30,
    Kind.DECISION: 1 << 20,
    Kind.BLOCK: 4 << 30,
    Kind.ENTRY: 256 << 20,
    Kind.END: 64,
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a container: what it is, its bytes, and where it begins in the file."""

    kind: Kind
    payload: bytes
    offset: int


class ContainerWriter:
    """Writes chunks one after another.

    Args:
        file: open for writing, at its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._num_chunks = 0
        file.write(_HEADER.pack(_MAGIC, MAJOR, MINOR))

    def write(self, kind: Kind, *parts: bytes) -> None:
        """Append a chunk whose payload is `parts`."""
        crc = 0
        for part in parts:
            crc = crc32c(part, crc)
        self._file.write(_CHUNK.pack(kind.value, crc, sum(map(len, parts))))
        for part in parts:
            self._file.write(part)
        self._num_chunks += 1

    def end(self) -> None:
        """Append the chunk that says that all are there."""
        self.write(Kind.END, struct.pack("<Q", self._num_chunks))


class ContainerReader:
    """Reads chunks one after another; whatever the file holds, memory holds one of them.

    Args:
        file: open for reading, seekable.
        name: of the file, for messages.

    Raises:
        CorruptRecordError: not a container.
        UnsupportedFormatError: of a newer major version.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._nbytes = file.seek(0, 2)
        self._last = Kind.HEADER
        self._num_chunks = 0
        file.seek(0)
        header = file.read(_HEADER.size)
        magic, major, minor = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0)
        if magic != _MAGIC:
            raise CorruptRecordError(f"{name}: not an exported stream")
        if major > MAJOR:
            raise UnsupportedFormatError(
                f"{name}: exported as format {major}.{minor}; this program reads up to {MAJOR}.x: upgrade kvstore"
            )

    def next(self) -> Chunk:
        """Read the next chunk; the one of kind `END` is the last.

        Raises:
            CorruptRecordError: the file is cut off or damaged, or its chunks are out of order.
        """
        offset = self._file.tell()
        head = self._file.read(_CHUNK.size)
        if len(head) < _CHUNK.size:
            raise CorruptRecordError(f"{self._name}: cut off at byte {offset}")
        value, crc, nbytes = _CHUNK.unpack(head)
        kind = next((kind for kind in Kind if kind.value == value), None)
        if kind is None or _ORDER[kind] < _ORDER[self._last]:
            raise CorruptRecordError(f"{self._name}: a chunk {value!r} at byte {offset}, where none may be")
        if nbytes > _MAX_NBYTES[kind] or nbytes > self._nbytes - self._file.tell():
            raise CorruptRecordError(
                f"{self._name}: a chunk of {nbytes} bytes at byte {offset}; it is cut off, or damaged"
            )
        payload = self._file.read(nbytes)
        if len(payload) != nbytes or crc32c(payload) != crc:
            raise CorruptRecordError(f"{self._name}: the chunk at byte {offset} is damaged")
        if kind is Kind.END and payload != struct.pack("<Q", self._num_chunks):
            raise CorruptRecordError(f"{self._name}: {self._num_chunks} chunks are there, others are missing")
        self._last = kind
        self._num_chunks += 1
        return Chunk(kind, payload, offset)

    def rewind(self, offset: int) -> None:
        """Read on from a chunk that was read before."""
        self._file.seek(offset)
        self._last = Kind.HEADER
