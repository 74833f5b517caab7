# SPDX-License-Identifier: Apache-2.0
"""What one model's K and V look like, measured once and kept by content (csrc/codec/FORMAT.md section 8)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.bases import BasisSums, group_layers
from kvstore.errors import ConfigError, SpecMismatchError
from kvstore.moments import Moments, PlaneParameters
from kvstore.native import Calibration as NativeCalibration
from kvstore.native import crc32c
from kvstore.spec import ModelSpec

CALIBRATION_ID_NBYTES = 16

MIN_TOKENS = 4096
"""Fewer tokens say too little of a channel: the standard error of a correlation is 1/64 at this many."""

SINK_TOKENS = 4
"""First tokens of a stream: their keys are like no others, and records hold them exactly (FORMAT.md section 9)."""

_HEADER = struct.Struct("<4sBBHIIQHHHH")  # magic, major, minor, -, crc32c, flags, total, layers, heads, key, value dim
_FIELDS = ("log_rms", "mean", "log_sigma", "log_residual", "rho", "log_step")
_ALIGNMENT = 4
_HAS_BASES = 1


class Calibration:
    """A calibration object. Immutable, thread-safe; equal bytes have equal ids.

    Args:
        data: the object's bytes; a copy is kept.

    Raises:
        CorruptRecordError: cut off, damaged or violating the format.
        UnsupportedFormatError: of a newer format.
    """

    def __init__(self, data: bytes) -> None:
        self.data = bytes(data)
        self.id = hashlib.blake2b(self.data, digest_size=CALIBRATION_ID_NBYTES).digest()
        self.native = NativeCalibration(self.data, self.id)

    @property
    def has_bases(self) -> bool:
        """True when it holds what profile `pca` needs."""
        return bool(_HEADER.unpack_from(self.data)[5] & _HAS_BASES)

    def check_spec(self, spec: ModelSpec) -> None:
        """Refuse models of another geometry.

        Raises:
            SpecMismatchError: layers, heads or dims differ.
        """
        found = _HEADER.unpack_from(self.data)[-4:]
        wanted = (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim)
        if found != wanted:
            raise SpecMismatchError(f"calibration is of (layers, heads, key dim, value dim) {found}; wanted {wanted}")


def can_have_bases(spec: ModelSpec) -> bool:
    """Whether a layer of a model has few enough channels for bases, by the tokens that a calibration takes."""
    return group_layers(spec.num_layers, spec.kv_heads * max(spec.key_dim, spec.value_dim), MIN_TOKENS) > 0


def calibrate(
    moments: Moments,
    log_steps: tuple[Tensor, Tensor] | None = None,
    *,
    bases: BasisSums | None = None,
    min_tokens: int = MIN_TOKENS,
) -> Calibration:
    """Make the calibration of what was measured.

    Args:
        moments: of K and V as they are stored, the first `SINK_TOKENS` of every stream left out.
        log_steps: see `Moments.planes`.
        bases: of the same tokens, for profile `pca`.
        min_tokens: refuse to judge by fewer.

    Raises:
        ConfigError: too few tokens.
        ShapeError: `log_steps` do not fit.
    """
    if moments.num_tokens < min_tokens:
        raise ConfigError(f"{moments.num_tokens} tokens are too few for a calibration; {min_tokens} are needed")
    planes = moments.planes(log_steps)
    return Calibration(_pack(planes, b"" if bases is None else bases.pack(planes)))


def _pack(planes: Sequence[PlaneParameters], bases: bytes) -> bytes:
    body = b"".join(_pack_plane(plane) for plane in planes) + bases
    kv_heads, key_dim = planes[0].mean.shape
    sizes = (_HEADER.size + len(body), len(planes) // 2, kv_heads, key_dim, planes[1].mean.shape[1])

    def head(crc: int) -> bytes:
        return _HEADER.pack(b"KVCL", 1, 0, 0, crc, _HAS_BASES if bases else 0, *sizes)

    return head(crc32c(head(0) + body)) + body


def _pack_plane(plane: PlaneParameters) -> bytes:
    parts: list[Tensor] = [getattr(plane, name).contiguous().flatten() for name in _FIELDS]
    data = b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts)
    return data + bytes(-len(data) % _ALIGNMENT)
