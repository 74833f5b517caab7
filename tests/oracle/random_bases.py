# SPDX-License-Identifier: Apache-2.0
"""Bases that a calibration might hold for a block: its own directions, some of them, or any vectors at all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.oracle.basis import Bases, Basis
from tests.oracle.calibration import Calibration
from tests.oracle.constants import step
from tests.oracle.elements import Bits, Dtype, from_binary32, to_binary32
from tests.oracle.parameters import Parameters

Numbers = NDArray[np.float64]


def with_random_bases(
    rng: np.random.Generator, planes: list[Bits], calibration: Calibration, dtype: Dtype
) -> Calibration:
    """The calibration of a block K0, V0, K1, V1, ..., and bases over any number of its layers."""
    num_layers = len(planes) // 2
    group_layers = int(rng.integers(1, num_layers + 1))
    groups = []
    for first in range(0, num_layers, group_layers):
        for side in range(2):
            members = range(2 * first + side, 2 * min(first + group_layers, num_layers), 2)
            rows = np.concatenate([planes[member] for member in members])
            groups.append(
                _random_basis(rng, rows, [calibration.planes[member] for member in members], dtype, side == 1)
            )
    return Calibration(calibration.planes, Bases(group_layers, tuple(groups)))


@np.errstate(all="ignore")
def _random_basis(
    rng: np.random.Generator, bits: Bits, known: list[Parameters], dtype: Dtype, has_scales: bool
) -> Basis:
    """Of rows [S, T, dim]."""
    num_rows, tokens, dim = bits.shape
    values = np.nan_to_num(to_binary32(dtype, bits).astype(np.float64), nan=0, posinf=0, neginf=0)
    lstep = np.concatenate([plane.lstep for plane in known])
    if has_scales:
        of_row = 8 * np.log2(np.sqrt((values**2).mean(axis=2)) + 1e-30)
        base = np.clip(np.rint(of_row.mean(axis=1)) + rng.integers(-3, 4, num_rows), -1000, 1000).astype(np.int64)
        code = np.broadcast_to(of_row[:, :, None] + lstep[:, None], values.shape)
        weighed = values * 2.0 ** (-np.clip(code, -800, 800) / 8)
    else:
        base = np.zeros(0, dtype=np.int64)
        code = np.concatenate([plane.lrms for plane in known])[:, None] + lstep
        values -= np.concatenate([plane.mean for plane in known])[:, None]
        weighed = values * step(-np.clip(code, -800, 800))[:, None]
    flat: Numbers = np.clip(np.nan_to_num(weighed), -1e6, 1e6).transpose(1, 0, 2).reshape(tokens, -1)
    rank = min(int(rng.choice([0, 1, 2, 20, 20, 63, 64, 65, 130])), flat.shape[1])
    if rng.integers(6) == 0:
        directions = rng.uniform(-1.9, 1.9, (rank, flat.shape[1]))
    else:
        directions = np.linalg.qr(np.vstack([flat, rng.standard_normal((rank, flat.shape[1]))]).T)[0].T[:rank]
    spread = np.sqrt(((flat @ directions.T) ** 2).mean(axis=0)) + 1e-9
    scales = num_rows if has_scales and rank else 0
    return Basis(
        np.rint(32 * np.log2(spread) + rng.normal(0, 8, rank)).astype(np.int64).clip(-32768, 32767),
        base[:scales],
        rng.integers(-200, 150, scales),
        from_binary32(Dtype.BFLOAT16, directions.astype(np.float32))
        .reshape(rank, num_rows, dim)
        .transpose(1, 0, 2)
        .copy(),
    )
