# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md sections 1, 2 and 10: header and directory, both ways, and a record's planes as the reader finds them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kvstore.errors import CorruptRecordError, SpecMismatchError, UnsupportedFormatError
from tests.oracle.basis import decode_group, group_fits
from tests.oracle.calibration import Calibration
from tests.oracle.checksum import crc32c
from tests.oracle.elements import Bits, Dtype
from tests.oracle.exponent import decode_exponent
from tests.oracle.parameters import CALIBRATION, Transform
from tests.oracle.quantised import decode_quantised
from tests.oracle.segments import Cut, fits, padded
from tests.oracle.split import decode_split

_HEADER = struct.Struct("<4sBBHIIQIBBHHHHHQ16s")
_ENTRY = struct.Struct("<IIBBbBBBH")
_CRC_AT = 8
_MAX_PLANE_NBYTES = 1 << 30
NO_CALIBRATION = bytes(16)


class Profile(IntEnum):
    RAW, ZSTD, LOSSLESS, Q8, Q4, Q3, Q2, PCA = range(8)

    @property
    def is_lossy(self) -> bool:
        return self >= Profile.Q8


class Coding(IntEnum):
    RAW, SPLIT, EXPONENT, QUANTISED, BASIS = range(5)


def allowed(profile: Profile) -> tuple[Coding, ...]:
    match profile:
        case Profile.RAW:
            return (Coding.RAW,)
        case Profile.ZSTD:
            return Coding.RAW, Coding.SPLIT
        case Profile.LOSSLESS:
            return Coding.RAW, Coding.EXPONENT
        case Profile.PCA:
            return Coding.RAW, Coding.EXPONENT, Coding.QUANTISED, Coding.BASIS
        case _:
            return Coding.RAW, Coding.EXPONENT, Coding.QUANTISED


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says beside magic, version, checksum and lengths."""

    segment_tokens: int
    dtype: Dtype
    profile: Profile
    num_layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    num_tokens: int
    first_token: int
    calibration: bytes = NO_CALIBRATION
    flags: int = 0
    minor: int = 0

    def shape(self, plane: int) -> tuple[int, int, int]:
        return self.kv_heads, self.num_tokens, self.value_dim if plane % 2 else self.key_dim

    def raw_nbytes(self, plane: int) -> int:
        heads, tokens, dim = self.shape(plane)
        return heads * tokens * dim * self.dtype.nbytes


@dataclass(frozen=True, slots=True)
class Plane:
    """A plane's stored bytes and the fields of its directory entry that say how to read them."""

    coding: Coding
    stored: bytes
    transform: Transform | None = None
    segment_heads: int = 0
    mult: int = 0  # coding 4

    @property
    def is_follower(self) -> bool:
        return self.coding is Coding.BASIS and not self.stored

    @property
    def is_calibrated(self) -> bool:
        return self.coding is Coding.BASIS or (self.transform is not None and self.transform.source == CALIBRATION)


def pack_record(header: Header, planes: list[Plane]) -> bytes:
    """A record with all lengths and checksums right, whatever the planes hold."""
    directory = body = b""
    for plane in planes:
        stored = plane.stored + bytes(-len(plane.stored) % 16)
        how = plane.transform
        fields = (how.byte, how.mult, how.low_bits, how.raw_rows, how.scale_class) if how else (0, plane.mult, 0, 0, 0)
        directory += _ENTRY.pack(len(plane.stored), crc32c(stored), plane.coding, *fields, plane.segment_heads)
        body += stored
    header_nbytes = _HEADER.size + len(directory)
    packed = bytearray(
        _HEADER.pack(
            *(b"KVX1", 1, header.minor, header.segment_tokens, 0, header.flags, header_nbytes + len(body)),
            *(header_nbytes, header.dtype, header.profile, header.num_layers, header.kv_heads),
            *(header.key_dim, header.value_dim, header.num_tokens, header.first_token, header.calibration),
        )
        + directory
    )
    struct.pack_into("<I", packed, _CRC_AT, crc32c(packed))
    return bytes(packed) + body


def parse_record(record: bytes) -> tuple[Header, list[Plane]]:
    """Header and planes, everything checked but what is inside the planes; later bytes are not read.

    Raises:
        UnsupportedFormatError: newer major version, or a required flag, dtype, profile, coding or transform unknown.
        CorruptRecordError: any other violation.
    """
    if len(record) < _HEADER.size or record[:4] != b"KVX1":
        raise CorruptRecordError("not a record")
    _, major, minor, segment_tokens, checksum, flags, total, header_nbytes, *sizes = _HEADER.unpack_from(record)
    dtype, profile, layers, heads, key_dim, value_dim, tokens, first_token, calibration = sizes
    if major != 1:
        raise UnsupportedFormatError(f"record of version {major}")
    if header_nbytes != _HEADER.size + 2 * layers * _ENTRY.size or header_nbytes > len(record):
        raise CorruptRecordError("the header's length does not fit")
    if crc32c(record[:_CRC_AT] + bytes(4) + record[_CRC_AT + 4 : header_nbytes]) != checksum:
        raise CorruptRecordError("wrong checksum of the header")
    entries = [_ENTRY.unpack_from(record, at) for at in range(_HEADER.size, header_nbytes, _ENTRY.size)]
    unknown_coding = any(entry[2] > Coding.BASIS for entry in entries)
    if flags & 0xFFFF or dtype > Dtype.FLOAT32 or profile > Profile.PCA or unknown_coding:
        raise UnsupportedFormatError("a flag, dtype, profile or coding of a newer version")
    if 0 in (segment_tokens, layers, heads, key_dim, value_dim, tokens):
        raise CorruptRecordError("a size of 0")
    header = Header(
        *(segment_tokens, Dtype(dtype), Profile(profile), layers, heads, key_dim, value_dim, tokens),
        *(first_token, calibration, flags, minor),
    )
    if max(header.raw_nbytes(0), header.raw_nbytes(1)) > _MAX_PLANE_NBYTES:
        raise CorruptRecordError("a plane of more than 2^30 bytes")

    planes, at = [], header_nbytes
    for index, (nbytes, crc, coding, *fields, segment_heads) in enumerate(entries):
        end = at + padded(nbytes, 16)
        stored = record[at : at + nbytes]
        if coding == Coding.BASIS:
            plane = _basis_plane(header, index, nbytes, stored, fields, segment_heads)
        else:
            plane = Plane(Coding(coding), stored, *_how(header, index, coding, fields, segment_heads))
        raw_nbytes = header.raw_nbytes(index)
        if plane.coding not in allowed(header.profile):
            raise CorruptRecordError(f"plane {index}: the profile does not allow its coding")
        if coding != Coding.BASIS and not (nbytes == raw_nbytes if coding == Coding.RAW else nbytes < raw_nbytes):
            raise CorruptRecordError(f"plane {index}: {nbytes} bytes for {raw_nbytes}")
        if end > len(record) or crc32c(record[at:end]) != crc:
            raise CorruptRecordError(f"plane {index}: cut off, or a wrong checksum")
        planes.append(plane)
        at = end
    if total != at:
        raise CorruptRecordError(f"the record has {total} bytes, its planes end at {at}")
    for holder, plane in enumerate(planes):
        if plane.is_follower and (holder < 2 or planes[holder - 2].coding is not Coding.BASIS):
            raise CorruptRecordError(f"plane {holder} follows none")
        raw_nbytes = header.raw_nbytes(holder) * (1 + num_followers(planes, holder))
        if plane.coding is Coding.BASIS and len(plane.stored) >= raw_nbytes:
            raise CorruptRecordError(f"plane {holder}: {len(plane.stored)} bytes for {raw_nbytes}")
    return header, planes


def num_followers(planes: list[Plane], holder: int) -> int:
    """Planes whose bytes plane `holder` holds, beside its own."""
    count = 0
    while holder + 2 * (count + 1) < len(planes) and planes[holder + 2 * (count + 1)].is_follower:
        count += 1
    return count


def _basis_plane(
    header: Header, index: int, nbytes: int, stored: bytes, fields: list[int], segment_heads: int
) -> Plane:
    transform, mult, *rest = fields
    tokens = header.num_tokens
    is_valid = group_fits(segment_heads, tokens, header.segment_tokens) if nbytes else not (mult or segment_heads)
    if transform or any(rest) or not is_valid:
        raise CorruptRecordError(f"plane {index}: an entry that coding 4 does not allow")
    if header.calibration == NO_CALIBRATION:
        raise CorruptRecordError("a plane refers to a calibration object, the header to none")
    return Plane(Coding.BASIS, stored, None, segment_heads, mult)


def _how(
    header: Header, index: int, coding: int, fields: list[int], segment_heads: int
) -> tuple[Transform | None, int]:
    transform = None
    heads, coded_tokens, dim = header.shape(index)
    if coding == Coding.QUANTISED:
        transform = Transform.parse(*fields)
        if transform.raw_rows >= coded_tokens:
            raise CorruptRecordError("no token is left to code")
        if transform.source == CALIBRATION and header.calibration == NO_CALIBRATION:
            raise CorruptRecordError("a plane refers to a calibration object, the header to none")
        coded_tokens -= transform.raw_rows
    elif any(fields):
        raise CorruptRecordError("fields of coding 3 in another coding")
    if coding in (Coding.EXPONENT, Coding.QUANTISED):
        if not 1 <= segment_heads <= heads or not fits(coded_tokens, dim, Cut(header.segment_tokens, segment_heads)):
            raise CorruptRecordError("segments are too large")
    elif segment_heads:
        raise CorruptRecordError("segment_heads without segments")
    return transform, segment_heads


def decode_record(record: bytes, calibrations: Mapping[bytes, Calibration] | None = None) -> tuple[Header, list[Bits]]:
    """Header, and element bits [H, T, dim] of every plane.

    Args:
        record: the record, and anything after it.
        calibrations: by id.

    Raises:
        UnsupportedFormatError: see `parse_record`.
        CorruptRecordError: damaged.
        SpecMismatchError: its calibration object is not there or of another geometry.
    """
    header, planes = parse_record(record)
    calibration = None
    if any(plane.is_calibrated for plane in planes):
        calibration = (calibrations or {}).get(header.calibration)
        geometry = (header.num_layers, header.kv_heads, header.key_dim, header.value_dim)
        if calibration is None or calibration.geometry != geometry:
            raise SpecMismatchError("the calibration object that planes refer to is not there, or of another geometry")
    decoded: list[Bits] = [np.zeros(0)] * len(planes)
    for index, plane in enumerate(planes):
        if plane.coding is not Coding.BASIS:
            decoded[index] = _decode_plane(header, index, plane, calibration)
        elif not plane.is_follower:
            assert calibration is not None
            count = 1 + num_followers(planes, index)
            for layer, bits in enumerate(_decode_group(header, index, plane, calibration, count)):
                decoded[index + 2 * layer] = bits
    return header, decoded


def _decode_group(header: Header, index: int, plane: Plane, calibration: Calibration, count: int) -> list[Bits]:
    """Planes of the first `count` layers of a group."""
    basis = calibration.bases.of_plane(index) if calibration.bases else None
    if basis is None or calibration.bases is None:
        raise CorruptRecordError(f"plane {index}: no group of the calibration begins there")
    layers = calibration.bases.layers_of(index, header.num_layers)
    if count > layers or plane.segment_heads > basis.runs:
        raise CorruptRecordError(f"plane {index}: its calibration counts other layers or fewer symbols to its group")
    heads, tokens, dim = header.shape(index)
    known = list(calibration.planes[index : index + 2 * layers : 2])
    shape, cut = (layers * heads, tokens, dim), Cut(header.segment_tokens, plane.segment_heads)
    bits = decode_group(plane.stored, header.dtype, shape, basis, known, plane.mult, cut)
    return list(bits.reshape(layers, heads, tokens, dim)[:count])


def _decode_plane(header: Header, index: int, plane: Plane, calibration: Calibration | None) -> Bits:
    dtype, shape = header.dtype, header.shape(index)
    cut = Cut(header.segment_tokens, plane.segment_heads)
    match plane.coding:
        case Coding.SPLIT:
            return decode_split(plane.stored, dtype, shape)
        case Coding.EXPONENT:
            return decode_exponent(plane.stored, dtype, shape, cut)
        case Coding.QUANTISED:
            assert plane.transform is not None
            known = calibration.planes[index] if calibration and plane.transform.source == CALIBRATION else None
            return decode_quantised(plane.stored, dtype, shape, plane.transform, known, cut)
        case _:
            return np.frombuffer(plane.stored, dtype.bits).reshape(shape)
