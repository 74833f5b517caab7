# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md section 8: the calibration object, both ways."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from tests.oracle.basis import Bases, parse_bases
from tests.oracle.checksum import crc32c
from tests.oracle.parameters import Parameters
from tests.oracle.segments import padded

_HEADER = struct.Struct("<4sBBHIIQHHHH")
_CRC_AT = 8
_HAS_BASES = 1
# Of a plane, after lrms: attribute, type as stored.
_CHANNEL_ARRAYS = (("mu", "<u2"), ("lsig", "i1"), ("lres", "i1"), ("rho", "u1"), ("lstep", "i1"))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Parameters of all planes K0, V0, K1, V1, ...; their shapes are the geometry."""

    planes: tuple[Parameters, ...]
    bases: Bases | None = None

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """Layers, kv_heads, key_dim, value_dim."""
        key, value = self.planes[:2]
        return len(self.planes) // 2, *key.lsig.shape, value.lsig.shape[1]

    def pack(self) -> bytes:
        body = b"".join(_pack_plane(plane) for plane in self.planes)
        body += self.bases.pack() if self.bases else b""
        total = _HEADER.size + len(body)
        unsigned = bytearray(
            _HEADER.pack(b"KVCL", 1, 0, 0, 0, _HAS_BASES if self.bases else 0, total, *self.geometry) + body
        )
        struct.pack_into("<I", unsigned, _CRC_AT, crc32c(unsigned))
        return bytes(unsigned)


def calibration_id(packed: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=16).digest()


def _pack_plane(plane: Parameters) -> bytes:
    out = plane.lrms.astype("<i2").tobytes()
    for name, kind in _CHANNEL_ARRAYS:
        out += getattr(plane, name).astype(kind).tobytes()
    return out + bytes(-len(out) % 4)


def _plane_nbytes(heads: int, dim: int) -> int:
    return padded(2 * heads + sum(np.dtype(kind).itemsize for _, kind in _CHANNEL_ARRAYS) * heads * dim, 4)


def _parse_plane(stored: bytes, heads: int, dim: int) -> Parameters:
    at = 2 * heads
    arrays: dict[str, Any] = {"lrms": np.frombuffer(stored, "<i2", heads).astype(np.int64)}
    for name, kind in _CHANNEL_ARRAYS:
        array = np.frombuffer(stored, kind, heads * dim, at).reshape(heads, dim)
        arrays[name] = array if name == "mu" else array.astype(np.int64)
        at += array.nbytes
    plane = Parameters(**arrays)
    plane.check()
    return plane


def parse_calibration(packed: bytes) -> Calibration:
    """Read a whole object.

    Raises:
        UnsupportedFormatError: a newer major version, or a required flag.
        CorruptRecordError: cut off, damaged, or a value out of range.
    """
    if len(packed) < _HEADER.size or packed[:4] != b"KVCL":
        raise CorruptRecordError("not a calibration object")
    _, major, _, reserved, checksum, flags, total, layers, heads, *dims = _HEADER.unpack_from(packed)
    if major != 1:
        raise UnsupportedFormatError(f"calibration of version {major}")
    if total != len(packed):
        raise CorruptRecordError(f"calibration of {total} bytes in {len(packed)}")
    if crc32c(packed[:_CRC_AT] + bytes(4) + packed[_CRC_AT + 4 :]) != checksum:
        raise CorruptRecordError("calibration: wrong checksum")
    if flags & 0xFFFF & ~_HAS_BASES:
        raise UnsupportedFormatError(f"calibration: flags {flags:#x}")
    if reserved or 0 in (layers, heads, *dims):
        raise CorruptRecordError("calibration: a size of 0, or a reserved field")
    nbytes = [_plane_nbytes(heads, dim) for dim in dims]
    end = _HEADER.size + layers * sum(nbytes)
    if total <= end if flags & _HAS_BASES else total != end:
        raise CorruptRecordError(f"calibration of {total} bytes does not hold its planes")
    planes, at = [], _HEADER.size
    for index in range(2 * layers):
        planes.append(_parse_plane(packed[at : at + nbytes[index % 2]], heads, dims[index % 2]))
        at += nbytes[index % 2]
    bases = parse_bases(packed[end:], layers, heads, dims) if flags & _HAS_BASES else None
    return Calibration(tuple(planes), bases)
