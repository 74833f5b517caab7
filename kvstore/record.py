# SPDX-License-Identifier: Apache-2.0
"""Header and directory of a record as values, and how they are read; FORMAT.md sections 1, 2 and 4."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import ShapeError
from kvstore.native import probe_record

if TYPE_CHECKING:
    from typing_extensions import Buffer

DTYPES = ("bfloat16", "float16", "float32")
"""Element types by their number in the format."""

_HEADER_NBYTES = 64
_ENTRY_NBYTES = 32
_PLANE_ALIGNMENT = 16


class Profile(StrEnum):
    """What a record promises: `raw` and `lossless` are bit-exact; `q8` is 8 bits an element, one scale a row."""

    RAW = "raw"
    LOSSLESS = "lossless"
    Q8 = "q8"


PROFILES = tuple(Profile)
"""Profiles by their number in the format."""


class Coding(IntEnum):
    """How one plane is stored (FORMAT.md section 3)."""

    RAW = 0
    SPLIT = 1
    Q8 = 2


class PlaneInfo(NamedTuple):
    """One directory entry: where K or V of one layer lies in the record, and how it is stored. Sizes in bytes."""

    offset: int
    nbytes: int
    raw_nbytes: int
    coding: Coding
    crc32c: int


@dataclass(frozen=True, slots=True)
class RecordInfo:
    """Header and directory of a record; `planes` in the order K0, V0, K1, V1, ..."""

    version: tuple[int, int]
    profile: Profile
    num_layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    num_tokens: int
    first_token: int
    header_nbytes: int
    total_nbytes: int
    planes: tuple[PlaneInfo, ...]


def header_nbytes(num_layers: int) -> int:
    """Bytes of header and directory: as much of a record as `Codec.probe` needs."""
    return _HEADER_NBYTES + 2 * num_layers * _ENTRY_NBYTES


def plane_span(info: RecordInfo, layers: range) -> tuple[int, int]:
    """Find the bytes of a record that hold a run of layers.

    Args:
        info: the record's header.
        layers: consecutive layers, at least one.

    Returns:
        offset and nbytes; they cover the checksummed padding too, as `Codec.decode_planes` needs it.

    Raises:
        ShapeError: `layers` is empty, has gaps, or goes beyond the record's layers.
    """
    planes = planes_of(info, layers)
    end = planes[-1].offset + -(-planes[-1].nbytes // _PLANE_ALIGNMENT) * _PLANE_ALIGNMENT
    return planes[0].offset, end - planes[0].offset


def probe(record: Buffer) -> RecordInfo:
    """Read and validate a record's header and directory; no plane is looked at.

    Args:
        record: the record, or at least its first `header_nbytes(num_layers)` bytes.

    Raises:
        CorruptRecordError: cut off, damaged, or violating the format.
        UnsupportedFormatError: a newer major version, or a required feature that this version does not know.
    """
    version, profile, layers, heads, key_dim, value_dim, dtype, tokens, first, header, total, planes = probe_record(
        record
    )
    entries = tuple(PlaneInfo(at, size, raw, Coding(coding), crc) for at, size, raw, coding, crc in planes)
    sizes = (layers, heads, key_dim, value_dim)
    return RecordInfo(version, PROFILES[profile], *sizes, DTYPES[dtype], tokens, first, header, total, planes=entries)


def planes_of(info: RecordInfo, layers: range) -> tuple[PlaneInfo, ...]:
    """Directory entries of consecutive layers, at least one.

    Raises:
        ShapeError: `layers` is empty, has gaps, or goes beyond the record's layers.
    """
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= info.num_layers:
        raise ShapeError(f"layers {layers} of {info.num_layers}; they must be consecutive, at least one")
    return info.planes[2 * layers.start : 2 * layers.stop]
