# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md section 9: what a writer measures of a plane: in-line parameters, and the scales of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.oracle.constants import MAX_CODE, RADIUS, clamp_code, log16, sum16
from tests.oracle.elements import Dtype, from_binary32, is_finite, to_binary32
from tests.oracle.parameters import Parameters
from tests.oracle.quantised import Scales

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@np.errstate(all="ignore")
def measured_parameters(coded: Floats) -> Parameters:
    """In-line parameters from the coded tokens [H, C, dim] as binary32."""
    heads, tokens, dim = coded.shape
    x = np.where(np.isfinite(coded), coded, np.float32(0))
    inv = np.float32(1) / np.float32(tokens)

    total = np.zeros((heads, dim), dtype=np.float32)
    for t in range(tokens):
        total = total + x[:, t]
    mean = total * inv
    with_zero = np.where(np.isfinite(mean), mean, np.float32(0))
    mu = from_binary32(Dtype.BFLOAT16, with_zero)
    mu = np.where(is_finite(Dtype.BFLOAT16, mu), mu, np.uint16(0))

    squares = np.zeros((heads, dim), dtype=np.float32)
    for t in range(tokens):
        d = x[:, t] - to_binary32(Dtype.BFLOAT16, mu)
        squares = squares + d * d
    m = squares * inv
    of_head, is_zero_head = log16(sum16(m) * (np.float32(1) / np.float32(dim)))
    lrms = clamp_code(np.where(is_zero_head, -MAX_CODE, (of_head + 2) >> 2))
    of_channel, is_zero_channel = log16(m)
    lsig = np.where(is_zero_channel, -128, np.clip(of_channel - 4 * lrms[:, None], -128, 127))
    zeros = np.zeros((heads, dim), dtype=np.int64)
    return Parameters(lrms, mu, lsig, zeros, zeros, zeros)


@np.errstate(all="ignore")
def measured_scales(coded: Floats, mult: int) -> tuple[Scales, int]:
    """Scales of the rows of [H, C, dim] as binary32, and their class (255: stored as they are)."""
    heads, tokens, dim = coded.shape
    x = np.where(np.isfinite(coded), coded, np.float32(0))
    of_row, is_zero = log16(sum16(x * x) * (np.float32(1) / np.float32(dim)))
    wanted = clamp_code(((of_row + 2) >> 2) - mult)
    low, high = np.zeros(heads, dtype=np.int64), np.zeros(heads, dtype=np.int64)
    for h in range(heads):
        rows = wanted[h][~is_zero[h]]
        if rows.size:
            low[h], high[h] = rows.min(), rows.max()

    if (high - low <= 126).all():
        base = (low + high + 1) >> 1
        residual = np.where(is_zero, 0, wanted - base[:, None])
        g = 80 * int(abs(residual).sum()) // (heads * tokens)
        scale_class = max((k for k in range(16) if g * g >= 1 << (k + 6)), default=0)
        while RADIUS[scale_class] < abs(residual).max():
            scale_class += 1
        return Scales(base, residual), scale_class
    base = np.maximum(high - 255, low)
    over_base = np.where(is_zero, 0, np.maximum(wanted - base[:, None], 0))
    return Scales(base, over_base), 255
