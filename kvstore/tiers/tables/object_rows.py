# SPDX-License-Identifier: Apache-2.0
"""Table `meta`: rows of the objects of streams, packed; each names a body, and repeats what that begins with."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.errors import ConfigError, CorruptRecordError, KVStoreError, UnsupportedFormatError
from kvstore.native import crc32c
from kvstore.spec import BlockKey
from kvstore.tiers.catalogue import ReadView, Table
from kvstore.tiers.tables.object_body import HEAD_NBYTES, PackedObject, check_kind, check_number, unpack_head

PREFIX = b"object "  # then stream id, kind, 0, index
_VERSION = 1
_ROW = struct.Struct("<BxxxIQ32s")  # version, first bytes of the body, blocks described, key; those bytes; CRC
_CRC = struct.Struct("<I")  # of the row's key and all before
_ID = struct.Struct(">Q")
_MAX_FIRST_NBYTES = 4096
"""A longer table stays in the body alone: pages of the catalogue are for what every look-up needs."""


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """An object of a stream.

    Args:
        kind: what it is.
        index: its number among those of its kind.
        num_blocks: blocks of the stream that it describes.
        body: key of its body in table `blocks`.
        first: what the body begins with: the head, and the table of its parts where that is short.
    """

    kind: str
    index: int
    num_blocks: int
    body: BlockKey
    first: bytes

    @property
    def has_table(self) -> bool:
        """Whether `first` holds the table."""
        return len(self.first) > HEAD_NBYTES


def first_of(packed: PackedObject) -> bytes:
    """What a row repeats of a body."""
    return packed.first if len(packed.first) <= _MAX_FIRST_NBYTES else packed.first[:HEAD_NBYTES]


def first_of_body(body: bytes) -> bytes:
    """The same of a body that is checked already."""
    end = unpack_head(body).table_end
    return bytes(body[: end if end <= _MAX_FIRST_NBYTES else HEAD_NBYTES])


def stream_prefix(stream_id: int, kind: str | None = None) -> bytes:
    """What the keys of a stream's objects begin with, of all kinds or of one."""
    return PREFIX + _ID.pack(stream_id) + (b"" if kind is None else check_kind(kind) + b"\0")


def row_key(stream_id: int, kind: str, index: int) -> bytes:
    """Key of a row: sorts by stream, kind, index."""
    return stream_prefix(stream_id, kind) + _ID.pack(index)


def stream_id_of(key: bytes) -> bytes:
    """The packed id of the stream in a row's key."""
    return key[len(PREFIX) : len(PREFIX) + _ID.size]


def pack_row(key: bytes, row: ObjectRow) -> bytes:
    """Pack the row that is stored under `key`."""
    value = _ROW.pack(_VERSION, len(row.first), row.num_blocks, row.body) + row.first
    return value + _CRC.pack(crc32c(key + value))


def unpack_row(key: bytes, value: bytes) -> ObjectRow:
    """Inverse of `pack_row`.

    Raises:
        CorruptRecordError: damaged, or fields that no writer produces.
        UnsupportedFormatError: a newer version of the row.
    """
    kind, _, index = key[len(PREFIX) + _ID.size :].partition(b"\0")
    body_end = len(value) - _CRC.size
    if value and value[0] > _VERSION:
        raise UnsupportedFormatError(f"object: a row of version {value[0]}; this program reads up to {_VERSION}")
    if (
        len(index) != _ID.size
        or body_end < _ROW.size
        or _CRC.unpack_from(value, body_end)[0] != crc32c(key + value[:body_end])
    ):
        raise CorruptRecordError("object: its row is damaged")
    version, first_nbytes, num_blocks, body = _ROW.unpack_from(value)
    first = value[_ROW.size : body_end]
    head = unpack_head(first)
    if version != _VERSION or len(first) != first_nbytes or first_nbytes not in (HEAD_NBYTES, head.table_end):
        raise CorruptRecordError(f"object: a row of version {version} with {len(first)} bytes of its body")
    row = ObjectRow(kind.decode("ascii", "replace"), _ID.unpack(index)[0], num_blocks, BlockKey(body), first)
    try:
        check_kind(row.kind)
        check_number("index", row.index)
        check_number("num_blocks", row.num_blocks)
    except ConfigError as error:
        raise CorruptRecordError(f"object: its row says what no writer says: {error}") from error
    return row


def every_row(view: ReadView, prefix: bytes = PREFIX) -> Iterator[tuple[bytes, ObjectRow | KVStoreError]]:
    """Yield rows by their keys; a damaged one as the error that says so."""
    for key, value in view.scan(Table.META, prefix=prefix):
        try:
            yield key, unpack_row(key, value)
        except KVStoreError as error:
            yield key, error


def count_rows(view: ReadView, body: BlockKey) -> int:
    """Count the rows of all streams that name a body; reads all of them."""
    return sum(isinstance(row, ObjectRow) and row.body == body for _, row in every_row(view))
