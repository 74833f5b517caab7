# SPDX-License-Identifier: Apache-2.0
"""The body of an object, as it lies in an extent: a head, the sizes and checksums of its parts, the parts."""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvstore.errors import ConfigError, CorruptRecordError, UnsupportedFormatError
from kvstore.native import crc32c

MAX_PARTS = 65536
MAX_BODY_NBYTES = 1 << 30
"""What is larger is cut into several objects: compaction and export hold a whole body in memory."""

_MAGIC = b"KVXO"
_VERSION = 1
_HEAD = struct.Struct("<4sHxxIIQ")  # magic, version, parts, CRC of the table, bytes of the body
_CRC = struct.Struct("<Ixxxx")  # of the 24 bytes before
HEAD_NBYTES = _HEAD.size + _CRC.size
_KIND = re.compile(r"[a-z0-9._:-]{1,64}")
_MAX_NUMBER = 1 << 63


@dataclass(frozen=True, slots=True)
class NewObject:
    """An object to be stored beside a stream: bytes whose meaning is not the store's.

    Args:
        kind: what it is: 1 to 64 characters of a-z, 0-9, `.`, `_`, `:`, `-`.
        index: its number among those of its kind.
        num_blocks: it describes the stream's first so many blocks: a rollback below drops it, a fork at or above shares
            it.
        parts: 1 to 65536, 1 GiB together at most; each is read alone and checked alone.
    """

    kind: str
    index: int
    num_blocks: int
    parts: Sequence[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """One object of a stream, as the catalogue lists it.

    Args:
        index: its number among those of its kind.
        num_blocks: blocks of the stream that it describes.
        part_nbytes: bytes of each part.
    """

    index: int
    num_blocks: int
    part_nbytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BodyHead:
    """What the first bytes of a body say: how many parts, the checksum of their table, bytes in all."""

    num_parts: int
    table_crc32c: int
    body_nbytes: int

    @property
    def table_end(self) -> int:
        """First byte behind the table, which follows the head."""
        return HEAD_NBYTES + 8 * self.num_parts


@dataclass(frozen=True, slots=True)
class PartTable:
    """Where the parts of a body are.

    Args:
        sizes: bytes of each.
        checksums: CRC32C of each.
        starts: offset of each in the body, and of the body's end.
    """

    sizes: array[int]
    checksums: array[int]
    starts: array[int]


@dataclass(frozen=True, slots=True)
class PackedObject:
    """An object that waits to be written: head and table packed, parts as they were given."""

    kind: str
    index: int
    num_blocks: int
    first: bytes
    parts: tuple[bytes, ...]

    @property
    def body_nbytes(self) -> int:
        """Bytes of the body."""
        return len(self.first) + sum(map(len, self.parts))


def check_kind(kind: str) -> bytes:
    """Return a kind as part of a key; raises `ConfigError` unless it is 1 to 64 of the characters that are allowed."""
    if not isinstance(kind, str) or _KIND.fullmatch(kind) is None:
        raise ConfigError(f"kind of object {kind!r:.80}: use 1 to 64 characters of a-z, 0-9, '.', '_', ':', '-'")
    return kind.encode()


def check_number(what: str, number: int) -> None:
    """Raise `ConfigError` unless `number` is one that the catalogue can hold."""
    if type(number) is not int or not 0 <= number < _MAX_NUMBER:
        raise ConfigError(f"object: {what} is {number!r}; it must be an integer from 0 to 2^63 - 1")


def pack_object(new: NewObject) -> PackedObject:
    """Check an object and pack what its body begins with; parts that may change under their views are copied.

    Raises:
        ConfigError: kind, index, num_blocks, or the number or sum of the parts are out of range.
    """
    check_kind(new.kind)
    check_number("index", new.index)
    check_number("num_blocks", new.num_blocks)
    what = f"object {new.kind} {new.index}"
    if not 1 <= len(new.parts) <= MAX_PARTS:
        raise ConfigError(f"{what}: {len(new.parts)} parts; use 1 to {MAX_PARTS}")
    nbytes = HEAD_NBYTES + 8 * len(new.parts) + sum(memoryview(part).nbytes for part in new.parts)
    if nbytes > MAX_BODY_NBYTES:
        raise ConfigError(f"{what}: {nbytes} bytes; cut what is larger than {MAX_BODY_NBYTES} into several objects")
    parts = tuple(part if type(part) is bytes else bytes(part) for part in new.parts)
    table = struct.pack(f"<{2 * len(parts)}I", *map(len, parts), *map(crc32c, parts))
    head = _HEAD.pack(_MAGIC, _VERSION, len(parts), crc32c(table), nbytes)
    return PackedObject(new.kind, new.index, new.num_blocks, head + _CRC.pack(crc32c(head)) + table, parts)


def unpack_head(data: bytes | memoryview) -> BodyHead:
    """Read the head of a body; `data` may go on behind it.

    Raises:
        CorruptRecordError: not an intact head, or one that no writer makes.
        UnsupportedFormatError: a newer version of it.
    """
    if len(data) < HEAD_NBYTES:
        raise CorruptRecordError(f"object: a body of {len(data)} bytes")
    packed = bytes(data[: _HEAD.size])
    magic, version, num_parts, table_crc, body_nbytes = _HEAD.unpack(packed)
    if magic != _MAGIC or _CRC.unpack_from(data, _HEAD.size)[0] != crc32c(packed):
        raise CorruptRecordError("object: its head is damaged")
    if version > _VERSION:
        raise UnsupportedFormatError(f"object: version {version}; this program reads up to {_VERSION}")
    head = BodyHead(num_parts, table_crc, body_nbytes)
    if not (1 <= num_parts <= MAX_PARTS and head.table_end <= body_nbytes <= MAX_BODY_NBYTES):
        raise CorruptRecordError(f"object: {num_parts} parts in {body_nbytes} bytes")
    return head


def unpack_table(data: bytes | memoryview) -> PartTable:
    """Read the table of a body that begins with `data`, which holds head and table; raises like `unpack_head`."""
    head = unpack_head(data)
    packed = bytes(data[HEAD_NBYTES : head.table_end])
    if len(packed) != 8 * head.num_parts or crc32c(packed) != head.table_crc32c:
        raise CorruptRecordError("object: the table of its parts is damaged")
    fields = array("I", packed)  # at once: questions read tables of hundreds of objects
    if sys.byteorder == "big":
        fields.byteswap()
    sizes, checksums = fields[: head.num_parts], fields[head.num_parts :]
    starts = array("Q", accumulate(sizes, initial=head.table_end))
    if starts[-1] != head.body_nbytes:
        raise CorruptRecordError(f"object: its parts end at {starts[-1]}, its body at {head.body_nbytes}")
    return PartTable(sizes, checksums, starts)


def check_body(body: bytes | memoryview) -> None:
    """Check a whole body with all its parts; raises like `unpack_head`."""
    table = unpack_table(body)
    if table.starts[-1] != len(body):
        raise CorruptRecordError(f"object: a body of {len(body)} bytes says that it has {table.starts[-1]}")
    for start, nbytes, checksum in zip(table.starts, table.sizes, table.checksums, strict=False):
        if crc32c(body[start : start + nbytes]) != checksum:
            raise CorruptRecordError("object: the checksum of a part does not match")
