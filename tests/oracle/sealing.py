# SPDX-License-Identifier: Apache-2.0
"""What a forger does: makes the checksums of damaged bytes right again."""

from __future__ import annotations

import struct

from tests.oracle.checksum import crc32c
from tests.oracle.segments import padded

_CRC_AT = 8
_HEADER_NBYTES = 64
_ENTRY_NBYTES = 16


def sealed_record(damaged: bytes) -> bytes:
    """With right checksums, as far as the lengths before them make sense."""
    record = bytearray(damaged)
    layers = struct.unpack_from("<H", record, 30)[0]
    header_nbytes = min(len(record), _HEADER_NBYTES + 2 * layers * _ENTRY_NBYTES)
    at = header_nbytes
    for entry in range(_HEADER_NBYTES, header_nbytes, _ENTRY_NBYTES):
        end = at + padded(struct.unpack_from("<I", record, entry)[0], 16)
        if end > len(record):
            break
        struct.pack_into("<I", record, entry + 4, crc32c(record[at:end]))
        at = end
    return _sealed(record, header_nbytes)


def sealed_calibration(damaged: bytes) -> bytes:
    return _sealed(bytearray(damaged), len(damaged))


def _sealed(data: bytearray, nbytes: int) -> bytes:
    struct.pack_into("<I", data, _CRC_AT, 0)
    struct.pack_into("<I", data, _CRC_AT, crc32c(data[:nbytes]))
    return bytes(data)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)
