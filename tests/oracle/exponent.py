# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md section 5: coding 2, bit-exact; the top byte of every rotated element is entropy-coded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import CorruptRecordError
from tests.oracle.elements import Bits, Dtype, rotate, unrotate
from tests.oracle.rans import STATES_NBYTES, TOTAL, Tables, decode, encode
from tests.oracle.segments import Cut, Sections, entries_to_rows, rows_to_entries, section, segments

Integers = NDArray[np.int64]

_BITS = 10
_MANY_ELEMENTS = 16384


class ExponentTables(NamedTuple):
    """Which table each channel uses, [H, dim], and the tables themselves, [tables, 256]."""

    table: Integers
    frequency: Integers


def top_bytes(bits: Bits) -> Integers:
    top: Integers = (rotate(bits) >> (8 * bits.itemsize - 8)).astype(np.int64)
    return top


def frequencies(count: Integers) -> Integers:
    """Frequencies of section 9 from how often each symbol occurs."""
    total = int(count.sum())
    if total == 0:
        return np.where(np.arange(256) == 0, TOTAL, 0)
    f = np.where(count > 0, np.maximum(1, (2048 * count + total) // (2 * total)), 0)
    while (excess := int(f.sum()) - TOTAL) != 0:
        f[np.argmax(f)] -= np.sign(excess)
    return np.asarray(f)


def writers_tables(dtype: Dtype, bits: Bits, *, is_key: bool) -> ExponentTables:
    """The tables that section 9 chooses for a plane [H, T, dim]."""
    symbols = top_bytes(bits)
    heads, tokens, dim = bits.shape
    table = np.zeros((heads, dim), dtype=np.int64)
    num_tables = 1
    if is_key and bits.size >= _MANY_ELEMENTS:
        num_tables = 4
        unit = 8 if dtype is Dtype.FLOAT16 else 1
        sums = symbols.sum(axis=1)
        key = 2 * sums // (tokens * unit)
        middle = 2 * int(sums.sum()) // (tokens * unit * heads * dim)
        table = np.clip(key - middle + 2, 0, 3)
    of_element = np.broadcast_to(table[:, None, :], symbols.shape)
    frequency = [frequencies(np.bincount(symbols[of_element == k], minlength=256)) for k in range(num_tables)]
    return ExponentTables(table, np.stack(frequency))


def _pack_tables(tables: ExponentTables) -> bytes:
    num_tables = len(tables.frequency)
    out = section(bytes([num_tables]))
    if num_tables > 1:
        nibbles = tables.table.reshape(-1)
        nibbles = np.pad(nibbles, (0, nibbles.size % 2))
        out += section((nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes())
    used = [np.flatnonzero(f) for f in tables.frequency]
    limits = bytes(int(limit) for u in used for limit in (u[0], u[-1]))
    values = [f[u[0] : u[-1] + 1] for f, u in zip(tables.frequency, used, strict=True) if u[0] < u[-1]]
    stored = np.concatenate([np.zeros(0, dtype=np.int64), *values])
    bits = (stored[:, None] >> np.arange(_BITS)) & 1
    return out + section(limits + np.packbits(bits.astype(np.uint8), bitorder="little").tobytes())


def _parse_tables(sections: Sections, heads: int, dim: int) -> ExponentTables:
    num_tables = sections.take(4)[0]
    if not 1 <= num_tables <= 16:
        raise CorruptRecordError(f"{num_tables} exponent tables; it must be 1 to 16")
    table = np.zeros(heads * dim, dtype=np.int64)
    if num_tables > 1:
        stored = np.frombuffer(sections.take((heads * dim + 1) // 2), dtype=np.uint8)
        table[:] = np.stack([stored & 15, stored >> 4], axis=1).reshape(-1)[: heads * dim]
    if table.max() >= num_tables:
        raise CorruptRecordError(f"a channel uses table {table.max()} of {num_tables}")
    # Limits and bit string are one section whose length the limits tell: they are looked at before it is taken.
    limits = np.frombuffer(sections.peek(2 * num_tables), dtype=np.uint8).astype(np.int64).reshape(-1, 2)
    if (limits[:, 0] > limits[:, 1]).any():
        raise CorruptRecordError("a table's first symbol lies behind its last")
    widths = np.where(limits[:, 0] < limits[:, 1], limits[:, 1] - limits[:, 0] + 1, 0)
    num_bits = _BITS * int(widths.sum())
    stored = np.frombuffer(sections.take(2 * num_tables + (num_bits + 7) // 8)[2 * num_tables :], dtype=np.uint8)
    bits = np.unpackbits(stored, bitorder="little")[:num_bits].astype(np.int64)
    values = bits.reshape(-1, _BITS) @ (1 << np.arange(_BITS))
    frequency = np.zeros((num_tables, 256), dtype=np.int64)
    at = 0
    for row, (first, last), width in zip(frequency, limits, widths, strict=True):
        row[first : last + 1] = values[at : at + width] if width else TOTAL
        at += width
    if (frequency.sum(axis=1) != TOTAL).any():
        raise CorruptRecordError("a table's frequencies do not sum to 1024")
    return ExponentTables(table.reshape(heads, dim), frequency)


def encode_exponent(bits: Bits, tables: ExponentTables, cut: Cut) -> bytes:
    """A plane [H, T, dim] of element bits as stored bytes."""
    heads, tokens, _ = bits.shape
    coder = Tables(0, tables.frequency)
    symbols = top_bytes(bits)
    of_element = np.broadcast_to(tables.table[:, None, :], symbols.shape)
    stored = [
        encode(
            coder,
            rows_to_entries(of_element[part.heads, part.tokens], coder.null),
            rows_to_entries(symbols[part.heads, part.tokens], 0),
        )
        for part in segments(heads, tokens, cut)
    ]
    words = np.array([(len(segment) - STATES_NBYTES) // 2 for segment in stored], dtype="<u4")
    rotated = rotate(bits).reshape(-1)
    low = b"".join(((rotated >> (8 * b)) & 255).astype(np.uint8).tobytes() for b in range(bits.itemsize - 1))
    return _pack_tables(tables) + words.tobytes() + section(low) + b"".join(section(segment) for segment in stored)


def decode_exponent(plane: bytes, dtype: Dtype, shape: tuple[int, int, int], cut: Cut) -> Bits:
    """Element bits [H, T, dim] of a stored plane.

    Raises:
        CorruptRecordError: the plane violates section 4 or 5.
    """
    heads, tokens, dim = shape
    n = heads * tokens * dim
    sections = Sections(plane)
    tables = _parse_tables(sections, heads, dim)
    parts = segments(heads, tokens, cut)
    words = np.frombuffer(sections.take(4 * len(parts)), dtype="<u4")
    low = np.frombuffer(sections.take((dtype.nbytes - 1) * n), dtype=np.uint8).reshape(-1, n)
    stored = [sections.take(STATES_NBYTES + 2 * int(count)) for count in words]
    sections.finish()

    coder = Tables(0, tables.frequency)
    symbols = np.zeros(shape, dtype=np.int64)
    for part, segment in zip(parts, stored, strict=True):
        block = symbols[part.heads, part.tokens]
        table = np.broadcast_to(tables.table[part.heads, None, :], block.shape)
        block[...] = entries_to_rows(decode(coder, rows_to_entries(table, coder.null), segment), len(block), dim)
    rotated = symbols.reshape(-1) << (8 * dtype.nbytes - 8)
    for b, stream in enumerate(low):
        rotated |= stream.astype(np.int64) << (8 * b)
    return unrotate(rotated.astype(dtype.bits)).reshape(shape)
