# SPDX-License-Identifier: Apache-2.0
"""Finds the record in the bytes of an extent, and checks that it is the one that the catalogue names."""

from __future__ import annotations

from kvstore.errors import CorruptRecordError
from kvstore.native import crc32c
from kvstore.spec import BlockKey
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, BlockRecord, unpack_extent_header


def record_in(data: memoryview, key: BlockKey, record: BlockRecord) -> memoryview:
    """Return the record's part of an extent's bytes, its CRC32C verified.

    Args:
        data: the whole extent, header first.
        key: the block that is expected.
        record: what the catalogue says of it.

    Raises:
        CorruptRecordError: another record, or damaged bytes.
        UnsupportedFormatError: a newer extent header.
    """
    header = unpack_extent_header(data)
    if (header.key, header.generation, header.record_nbytes) != (key, record.generation, record.record_nbytes):
        raise CorruptRecordError("the extent holds another record than the catalogue says")
    body = data[EXTENT_HEADER_NBYTES : EXTENT_HEADER_NBYTES + record.record_nbytes]
    if crc32c(body) != header.record_crc32c:
        raise CorruptRecordError("the record's checksum does not match")
    return body
