# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md sections 6.1 to 6.3: transform, parameters, and the step and class of every element."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from tests.oracle.constants import clamp_code
from tests.oracle.elements import Dtype, is_finite, to_binary32

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

PER_HEAD, PER_ROW, PER_CHANNEL = range(3)
NONE, CALIBRATION, IN_LINE, WEIGHTED = range(4)
MAX_LRMS = 1000


@dataclass(frozen=True, slots=True)
class Transform:
    """Fields of the directory that say how a plane is quantised."""

    axis: int
    mean: bool = False
    dpcm: bool = False
    source: int = NONE
    mult: int = 0
    low_bits: int = 0
    raw_rows: int = 0
    scale_class: int = 0

    @property
    def byte(self) -> int:
        return self.axis | self.mean << 2 | self.dpcm << 3 | self.source << 4

    @property
    def has_coded_scales(self) -> bool:
        return self.axis == PER_ROW and self.scale_class != 255

    @property
    def is_in_line(self) -> bool:
        return self.source in (IN_LINE, WEIGHTED)

    @classmethod
    def parse(cls, byte: int, mult: int, low_bits: int, raw_rows: int, scale_class: int) -> Transform:
        """Read the five fields.

        Raises:
            UnsupportedFormatError: reserved bits, axis or source.
            CorruptRecordError: a combination that section 6.1 or the directory forbids.
        """
        axis, source = byte & 3, byte >> 4 & 3
        if byte >> 6 or axis == 3:
            raise UnsupportedFormatError(f"transform {byte:#04x}")
        self = cls(axis, bool(byte & 4), bool(byte & 8), source, mult, low_bits, raw_rows, scale_class)
        if source == NONE and (axis != PER_ROW or self.mean or self.dpcm):
            raise CorruptRecordError("a transform without parameters allows axis 1 alone")
        if self.dpcm and source != CALIBRATION:
            raise CorruptRecordError("dpcm without a calibration object")
        if source == WEIGHTED and axis != PER_HEAD:
            raise CorruptRecordError("steps that follow from deviations are for axis 0")
        scale_classes = (*range(16), 255) if axis == PER_ROW else (0,)
        if low_bits > 3 or raw_rows > 4 or scale_class not in scale_classes:
            raise CorruptRecordError("low_bits, raw_rows or scale_class out of range")
        return self


@dataclass(frozen=True, slots=True)
class Parameters:
    """What is known of a plane's channels: lrms [H], all others [H, dim]; mu as bits of bfloat16."""

    lrms: Integers
    mu: NDArray[np.uint16]
    lsig: Integers
    lres: Integers
    rho: Integers
    lstep: Integers

    @classmethod
    def zeros(cls, heads: int, dim: int) -> Parameters:
        channels = np.zeros((heads, dim), dtype=np.int64)
        mu = np.zeros((heads, dim), dtype=np.uint16)
        return cls(np.zeros(heads, dtype=np.int64), mu, channels, channels, channels, channels)

    def of_heads(self, heads: slice) -> Parameters:
        return Parameters(*(getattr(self, name)[heads] for name in self.__slots__))

    def check(self) -> None:
        """Refuse what section 6.2 and 8 forbid.

        Raises:
            CorruptRecordError: a value is out of range.
        """
        if (abs(self.lrms) > MAX_LRMS).any() or not is_finite(Dtype.BFLOAT16, self.mu).all() or self.rho.max() > 250:
            raise CorruptRecordError("lrms, mu or rho out of range")

    def pack_in_line(self) -> bytes:
        return self.lrms.astype("<i2").tobytes() + self.mu.astype("<u2").tobytes() + self.lsig.astype("i1").tobytes()

    @staticmethod
    def in_line_nbytes(heads: int, dim: int) -> int:
        return 2 * heads + 3 * heads * dim

    @classmethod
    def parse_in_line(cls, stored: bytes, heads: int, dim: int) -> Parameters:
        """Raises CorruptRecordError when a value is out of range."""
        n = heads * dim
        zeros = np.zeros((heads, dim), dtype=np.int64)
        self = cls(
            np.frombuffer(stored, "<i2", heads).astype(np.int64),
            np.frombuffer(stored, "<u2", n, 2 * heads).reshape(heads, dim),
            np.frombuffer(stored, "i1", n, 2 * heads + 2 * n).reshape(heads, dim).astype(np.int64),
            zeros,
            zeros,
            zeros,
        )
        self.check()
        return self

    def weighted(self) -> Parameters:
        """Steps as source 3 derives them."""
        return replace(self, lstep=-((3 * self.lsig + 8) >> 4))

    @property
    def mean(self) -> Floats:
        return to_binary32(Dtype.BFLOAT16, self.mu)

    @property
    def prediction(self) -> Floats:
        """rho / 256."""
        return self.rho.astype(np.float32) / np.float32(256)

    def _channel_code(self) -> Integers:
        return (self.lsig + 2) >> 2

    def codes(self, transform: Transform, scales: Integers) -> Integers:
        """Step codes [H, C, dim]; `scales` [H, C] matter for axis 1 alone, and give C for the others."""
        heads, coded = scales.shape
        of_head = (self.lrms - transform.mult)[:, None, None]
        match transform.axis:
            case 0:
                code = of_head
            case 1:
                code = scales[:, :, None]
            case _:
                code = of_head + self._channel_code()[:, None, :]
        return np.broadcast_to(clamp_code(code + self.lstep[:, None, :]), (heads, coded, self.lsig.shape[1]))

    def classes(self, transform: Transform) -> tuple[Integers, Integers]:
        """Classes [H, dim] in the first token of a segment, and in the others."""
        offset = 4 * self.lstep
        if transform.axis == PER_CHANNEL:
            offset = offset + 4 * self._channel_code()

        def classes_of(level: Integers) -> Integers:
            scaled = level - offset + 4 * (transform.mult - 8 * transform.low_bits)
            return np.asarray(np.clip(((scaled + 8) >> 4) + 6, 0, 15))

        return classes_of(self.lsig), classes_of(self.lres if transform.dpcm else self.lsig)
