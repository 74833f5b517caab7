# SPDX-License-Identifier: Apache-2.0
"""Objects in the file of an exported stream: packed behind its end, and read back."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

from kvstore.errors import ConfigError, CorruptRecordError, UnsupportedFormatError
from kvstore.spec import BlockKey
from kvstore.tiers.catalogue import WriteView
from kvstore.tiers.tables.blocks import add_reference, find_sound
from kvstore.tiers.tables.object_body import check_body, check_kind, unpack_head
from kvstore.tiers.tables.object_rows import ObjectRow, first_of_body
from kvstore.tiers.tables.objects import find_object, put_object
from kvstore.tiers.upkeep.container import ContainerReader, ContainerWriter, Kind
from kvstore.tiers.upkeep.transfer import EncodedBlock, RecordTransfer

_PREFIX = struct.Struct("<B7xQQ32s")  # bytes of the kind, index, blocks described, key of the body; kind; body


def write_objects(transfer: RecordTransfer, rows: Sequence[ObjectRow], container: ContainerWriter) -> int:
    """Write objects, and that they were all; returns how many: those whose bodies are lost are left out."""
    count = 0
    for row, body in zip(rows, transfer.read([row.body for row in rows]), strict=True):
        if body is not None:
            kind = row.kind.encode()
            prefix = _PREFIX.pack(len(kind), row.index, row.num_blocks, row.body)
            container.write(Kind.OBJECT, prefix, kind, body.record)
            count += 1
    container.finish()
    return count


def read_objects(reader: ContainerReader, path: str, num_entries: int) -> Iterator[tuple[ObjectRow, EncodedBlock]]:
    """Yield the objects that follow the end of a stream of `num_entries` blocks, checked.

    Raises:
        CorruptRecordError: the file is cut off or damaged, or an object cannot be one of the stream.
        UnsupportedFormatError: a newer program wrote one.
    """
    while (chunk := reader.next()).kind is Kind.OBJECT:
        payload, where = chunk.payload, f"{path}: the object at byte {chunk.offset}"
        if len(payload) < _PREFIX.size or len(payload) < _PREFIX.size + payload[0]:
            raise CorruptRecordError(f"{where} has {len(payload)} bytes")
        kind_nbytes, index, num_blocks, key = _PREFIX.unpack_from(payload)
        body = payload[_PREFIX.size + kind_nbytes :]
        try:
            kind = payload[_PREFIX.size : _PREFIX.size + kind_nbytes].decode("ascii")
            check_kind(kind)
            check_body(body)
        except (UnicodeDecodeError, ConfigError, CorruptRecordError) as error:
            raise CorruptRecordError(f"{where}: {error}") from error
        if num_blocks > num_entries or index >> 63:
            raise CorruptRecordError(f"{where} has number {index} and describes {num_blocks} blocks of {num_entries}")
        yield ObjectRow(kind, index, num_blocks, BlockKey(key), first_of_body(body)), EncodedBlock(key, 0, body)


def restore_objects(view: WriteView, stream_id: int, num_entries: int, rows: Sequence[ObjectRow]) -> None:
    """Name objects that a stream lacks, and whose bodies are stored; what it has stays."""
    for row in rows:
        present: ObjectRow | None = None
        with suppress(CorruptRecordError, UnsupportedFormatError):
            present = find_object(view, stream_id, row.kind, row.index)
        record = find_sound(view, row.body)
        is_stored = record is not None and (record.num_tokens, record.record_nbytes) == (
            0,
            unpack_head(row.first).body_nbytes,
        )
        if present is None and is_stored:
            add_reference(view, row.body)
            put_object(view, stream_id, num_entries, row)
