# SPDX-License-Identifier: Apache-2.0
"""CRC32C: known values, and the CPU's instruction against the tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.native import crc32c, crc32c_table

# RFC 3720, appendix B.4, and the check value of the CRC catalogue.
KNOWN = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]
# Around the lengths at which the instruction changes its stride: 8 bytes, 3 x 256, 3 x 4096.
EDGES = [1, 7, 8, 9, 767, 768, 769, 775, 776, 12287, 12288, 12289, 13056, 24576, 40000]


@pytest.mark.parametrize(("data", "crc"), KNOWN)
def test_known_values(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc
    assert crc32c_table(data) == crc


@pytest.mark.parametrize("nbytes", EDGES)
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_the_instruction_agrees_with_the_tables(nbytes: int, offset: int) -> None:
    data = memoryview(bytes(index * 197 % 251 for index in range(nbytes + offset)))[offset:]

    assert crc32c(data) == crc32c_table(data)
    assert crc32c(data, 0x12345678) == crc32c_table(data, 0x12345678)


@given(st.binary(max_size=2000), st.binary(max_size=2000), st.integers(0, 2**32 - 1))
def test_a_seed_continues_a_checksum(first: bytes, second: bytes, seed: int) -> None:
    assert crc32c(second, crc32c(first, seed)) == crc32c(first + second, seed)
