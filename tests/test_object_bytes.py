# SPDX-License-Identifier: Apache-2.0
"""Bodies and rows of objects that no writer makes: refused before their sizes are believed."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.native import crc32c
from kvstore.tiers.tables.object_body import check_body, unpack_table
from kvstore.tiers.tables.object_rows import unpack_row


def _body(num_parts: int, nbytes: int, table: bytes, *, magic: bytes = b"KVXO", version: int = 1) -> bytes:
    """What a body begins with, all checksums right."""
    head = struct.pack("<4sHxxIIQ", magic, version, num_parts, crc32c(table), nbytes)
    return head + struct.pack("<Ixxxx", crc32c(head)) + table


HOSTILE = [
    _body(0, 32, b""),
    _body(65537, 1 << 20, b""),
    _body(1 << 31, 1 << 40, b""),
    _body(1, (1 << 30) + 1, struct.pack("<II", (1 << 30) - 39, 0)),
    _body(1, 39, b""),
    _body(2, 48 + 10, struct.pack("<4I", 6, 5, 0, 0)),
    _body(2, 48 + 10, struct.pack("<4I", 6, 4, 0, 0))[:-1],
    _body(1, 40, struct.pack("<II", 0, 0), magic=b"KVXT"),
    _body(1, 40, struct.pack("<II", 0, 0))[:31],
    _body(1, 40, struct.pack("<II", 0, 0))[:24] + bytes(16),
    b"",
]


@pytest.mark.parametrize("first", HOSTILE, ids=range(len(HOSTILE)))
def test_what_no_writer_makes_is_refused_before_anything_is_read(first: bytes) -> None:
    with pytest.raises(CorruptRecordError):
        unpack_table(first)
    with pytest.raises(CorruptRecordError):
        check_body(first)
    with pytest.raises(UnsupportedFormatError):
        unpack_table(_body(1, 40, struct.pack("<II", 0, 0), version=2))


@given(key=st.binary(max_size=40), value=st.binary(max_size=120))
def test_any_bytes_end_in_a_typed_error(key: bytes, value: bytes) -> None:
    for data in (value, _body(1, 40, b"")[:24] + value, _body(2, 100, value[:16])):
        with suppress(CorruptRecordError, UnsupportedFormatError):
            check_body(data)
        with suppress(CorruptRecordError, UnsupportedFormatError):
            unpack_row(b"object " + key, data + struct.pack("<I", crc32c(b"object " + key + data)))


def _row(kind: bytes, index: int, num_blocks: int) -> tuple[bytes, bytes]:
    """A row of an object of one empty part: its key and its value, all checksums right."""
    first = _body(1, 40, struct.pack("<II", 0, 0))
    key = b"object " + bytes(8) + kind + b"\0" + struct.pack(">Q", index)
    value = struct.pack("<BxxxIQ32s", 1, len(first), num_blocks, bytes(32)) + first
    return key, value + struct.pack("<I", crc32c(key + value))


def test_rows_with_names_and_numbers_that_no_writer_gives_are_refused() -> None:
    assert unpack_row(*_row(b"kind", (1 << 63) - 1, (1 << 63) - 1)).kind == "kind"
    for row in (_row(b"", 0, 0), _row(b"\xff", 0, 0), _row(b"A", 0, 0), _row(b"a", 1 << 63, 0), _row(b"a", 0, 1 << 63)):
        with pytest.raises(CorruptRecordError, match="no writer"):
            unpack_row(*row)
