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
MINOR = 1
"""Since 1.1 objects may follow the end of the stream; a file without any is one of 1.0."""

_MAGIC = b"KVXP"
_HEADER = struct.Struct("<4sHH")  # magic, major, minor
_CHUNK = struct.Struct("<4sIQ")  # kind, CRC32C of the payload, bytes of the payload


class Kind(Enum):
    """Kinds of chunks, in the order in which they come; a reader of 1.0 stops at `END`."""

    HEADER = b"HEAD"
    STATE = b"STAT"
    CALIBRATION = b"CALI"
    DECISION = b"DECI"
    BLOCK = b"BLCK"
    ENTRY = b"ENTR"
    END = b"DONE"
    OBJECT = b"OBJT"
    LAST = b"LAST"


_ORDER = {kind: position for position, kind in enumerate(Kind)}
_MAX_NBYTES = {
    Kind.HEADER: 16 << 20,
    Kind.STATE: 16 << 20,
    Kind.CALIBRATION: 1 << 30,
    Kind.DECISION: 1 << 20,
    Kind.BLOCK: 4 << 30,
    Kind.ENTRY: 256 << 20,
    Kind.END: 64,
    Kind.OBJECT: (1 << 30) + 4096,
    Kind.LAST: 64,
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
        has_objects: whether objects will follow the end of the stream, and `finish` them.
    """

    def __init__(self, file: BinaryIO, *, has_objects: bool = False) -> None:
        self._file = file
        self._num_chunks = 0
        file.write(_HEADER.pack(_MAGIC, MAJOR, MINOR if has_objects else 0))

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
        """Append the chunk that says that all of the stream are there."""
        self.write(Kind.END, struct.pack("<Q", self._num_chunks))

    def finish(self) -> None:
        """Append the chunk that says that all objects are there, too."""
        self.write(Kind.LAST, struct.pack("<Q", self._num_chunks))


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
        self.has_objects = False
        """Whether objects follow the end of the stream."""
        file.seek(0)
        header = file.read(_HEADER.size)
        magic, major, minor = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0)
        if magic != _MAGIC:
            raise CorruptRecordError(f"{name}: not an exported stream")
        if major > MAJOR:
            raise UnsupportedFormatError(
                f"{name}: exported as format {major}.{minor}; this program reads up to {MAJOR}.x: upgrade kvstore"
            )
        self.has_objects = minor > 0

    def next(self) -> Chunk:
        """Read the next chunk; the one of kind `END` is the last of the stream, that of kind `LAST` of its objects.

        Behind `END`, chunks of kinds that newer programs write are passed over.

        Raises:
            CorruptRecordError: the file is cut off or damaged, or its chunks are out of order.
        """
        while True:
            offset = self._file.tell()
            head = self._file.read(_CHUNK.size)
            if len(head) < _CHUNK.size:
                raise CorruptRecordError(f"{self._name}: cut off at byte {offset}")
            value, crc, nbytes = _CHUNK.unpack(head)
            kind = next((kind for kind in Kind if kind.value == value), None)
            is_newer = kind is None and _ORDER[self._last] >= _ORDER[Kind.END]
            if not is_newer or nbytes > self._nbytes - self._file.tell():
                break
            self._file.seek(nbytes, 1)
            self._num_chunks += 1
        if kind is None or _ORDER[kind] < _ORDER[self._last]:
            raise CorruptRecordError(f"{self._name}: a chunk {value!r} at byte {offset}, where none may be")
        if nbytes > _MAX_NBYTES[kind] or nbytes > self._nbytes - self._file.tell():
            raise CorruptRecordError(
                f"{self._name}: a chunk of {nbytes} bytes at byte {offset}; it is cut off, or damaged"
            )
        payload = self._file.read(nbytes)
        if len(payload) != nbytes or crc32c(payload) != crc:
            raise CorruptRecordError(f"{self._name}: the chunk at byte {offset} is damaged")
        if kind in (Kind.END, Kind.LAST) and payload != struct.pack("<Q", self._num_chunks):
            raise CorruptRecordError(f"{self._name}: {self._num_chunks} chunks are there, others are missing")
        self._last = kind
        self._num_chunks += 1
        return Chunk(kind, payload, offset)

    @property
    def offset(self) -> int:
        """Bytes of the file that were read."""
        return self._file.tell()

    def rewind(self, offset: int) -> None:
        """Read on from a chunk that was read before."""
        self._file.seek(offset)
        self._last = Kind.HEADER
