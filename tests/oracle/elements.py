# SPDX-License-Identifier: Apache-2.0
"""Elements as the integers that hold their bits: rotation, conversion to binary32, and rounding back."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]
Floats = NDArray[np.float32]


class Dtype(IntEnum):
    """FORMAT.md section 1, field dtype."""

    BFLOAT16 = 0
    FLOAT16 = 1
    FLOAT32 = 2

    @property
    def nbytes(self) -> int:
        return 4 if self is Dtype.FLOAT32 else 2

    @property
    def bits(self) -> np.dtype[Any]:
        return np.dtype(f"<u{self.nbytes}")


def rotate(bits: Bits) -> Bits:
    """Left by one: the sign moves to bit 0."""
    return (bits << 1) | (bits >> (8 * bits.itemsize - 1))


def unrotate(bits: Bits) -> Bits:
    return (bits >> 1) | (bits << (8 * bits.itemsize - 1))


@np.errstate(all="ignore")
def to_binary32(dtype: Dtype, bits: Bits) -> Floats:
    match dtype:
        case Dtype.BFLOAT16:
            return (bits.astype(np.uint32) << 16).view(np.float32)
        case Dtype.FLOAT16:
            return bits.view(np.float16).astype(np.float32)
        case Dtype.FLOAT32:
            return bits.view(np.float32)


@np.errstate(all="ignore")
def from_binary32(dtype: Dtype, x: Floats) -> Bits:
    """Rounded to nearest even, overflow to infinity; `x` holds no NaN."""
    match dtype:
        case Dtype.BFLOAT16:
            bits = x.view(np.uint32)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        case Dtype.FLOAT16:
            return x.astype(np.float16).view("<u2")
        case Dtype.FLOAT32:
            return x.astype("<f4").view("<u4")


def is_finite(dtype: Dtype, bits: Bits) -> NDArray[np.bool_]:
    exponent = {Dtype.BFLOAT16: 0x7F80, Dtype.FLOAT16: 0x7C00, Dtype.FLOAT32: 0x7F800000}[dtype]
    return np.asarray((bits & exponent) != exponent)
