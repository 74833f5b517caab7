# SPDX-License-Identifier: Apache-2.0
"""Random blocks that look like KV, and elements that try a codec: NaNs, infinities, denormals, outliers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.oracle.calibration import Calibration
from tests.oracle.elements import Bits, Dtype, from_binary32, to_binary32
from tests.oracle.measuring import measured_parameters
from tests.oracle.parameters import Parameters

Floats = NDArray[np.float32]


class Geometry(NamedTuple):
    """Sizes of a block."""

    num_layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    num_tokens: int

    def shape(self, plane: int) -> tuple[int, int, int]:
        return self.kv_heads, self.num_tokens, self.value_dim if plane % 2 else self.key_dim


def _kv_like(rng: np.random.Generator, shape: tuple[int, int, int]) -> Floats:
    """Channels of different means and widths, rows of different widths, tokens that resemble the one before."""
    heads, tokens, dim = shape
    noise = rng.standard_normal(shape)
    rho = rng.uniform(0, 1, (heads, dim))
    for t in range(1, tokens):
        noise[:, t] += rho * noise[:, t - 1]
    width = np.exp(rng.normal(0, 1, (heads, 1, dim))) * np.exp(rng.normal(0, 0.5, (heads, tokens, 1)))
    return np.asarray(noise * width + rng.normal(0, 2, (heads, 1, dim)), dtype=np.float32)


def _magnitudes(rng: np.random.Generator, shape: tuple[int, int, int]) -> Floats:
    """All magnitudes that binary32 has, zeros and denormals too."""
    sign = rng.choice([-1.0, 1.0], shape)
    magnitudes: Floats = np.ldexp(sign * rng.uniform(0, 2, shape), rng.integers(-150, 128, shape)).astype(np.float32)
    return magnitudes


def _rows_apart(rng: np.random.Generator, shape: tuple[int, int, int]) -> Floats:
    """Rows too far apart for coded scales; some are zero."""
    scale = np.ldexp(rng.integers(0, 4, shape[:2]), rng.integers(-60, 60, shape[:2]))
    return (rng.standard_normal(shape) * scale[:, :, None]).astype(np.float32)


_SPECIAL = {
    Dtype.BFLOAT16: [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFC1, 0xFFFF],
    Dtype.FLOAT16: [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFE01, 0xFFFF],
    Dtype.FLOAT32: [
        *(0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000),
        *(0x7F800001, 0x7FC00000, 0xFFC00001, 0xFFFFFFFF, 0x477FEFFF, 0x477FF000, 0x7F7F7FFF, 0x7F7F8000),
    ],
}
FLAVOURS = ("kv", "spiked", "bits", "magnitudes", "rows", "constant", "zero")


@np.errstate(all="ignore")
def random_plane(rng: np.random.Generator, shape: tuple[int, int, int], dtype: Dtype, flavour: str) -> Bits:
    """Element bits [H, T, dim].

    Args:
        rng: where the randomness comes from.
        shape: [H, T, dim].
        dtype: of the elements.
        flavour: one of FLAVOURS.
    """
    match flavour:
        case "kv":
            return from_binary32(dtype, _kv_like(rng, shape))
        case "spiked":
            bits = from_binary32(dtype, _kv_like(rng, shape))
            spikes = rng.random(shape) < rng.choice([0.002, 0.02, 0.3])
            far = from_binary32(dtype, _magnitudes(rng, shape))
            strange = rng.choice(np.array(_SPECIAL[dtype], dtype=dtype.bits), shape)
            return np.where(spikes, np.where(rng.random(shape) < 0.5, far, strange), bits).astype(dtype.bits)
        case "bits":
            return rng.integers(0, 1 << 8 * dtype.nbytes, shape).astype(dtype.bits)
        case "magnitudes":
            return from_binary32(dtype, _magnitudes(rng, shape))
        case "rows":
            return from_binary32(dtype, _rows_apart(rng, shape))
        case "constant":
            of_channel = rng.choice(np.array(_SPECIAL[dtype], dtype=dtype.bits), (shape[0], 1, shape[2]))
            return np.broadcast_to(of_channel, shape).copy()
        case _:
            return np.zeros(shape, dtype=dtype.bits)


def random_block(rng: np.random.Generator, geometry: Geometry, dtype: Dtype, flavour: str) -> list[Bits]:
    """Planes K0, V0, K1, V1, ..."""
    return [random_plane(rng, geometry.shape(plane), dtype, flavour) for plane in range(2 * geometry.num_layers)]


def random_parameters(rng: np.random.Generator, plane: Bits, dtype: Dtype) -> Parameters:
    """What a calibration might hold for such a plane: measured, then disturbed so that all values occur."""
    heads, _, dim = plane.shape
    measured = measured_parameters(to_binary32(dtype, plane))

    def disturbed(spread: int, low: int, high: int) -> NDArray[np.int64]:
        usual = np.rint(rng.normal(0, spread, (heads, dim))).astype(np.int64)
        rare = rng.integers(low, high + 1, (heads, dim))
        return np.clip(np.where(rng.random((heads, dim)) < 0.02, rare, usual), low, high)

    lsig = np.clip(measured.lsig + disturbed(4, -128, 127), -128, 127)
    return Parameters(
        np.clip(measured.lrms + rng.integers(-3, 4, heads), -1000, 1000),
        measured.mu,
        lsig,
        np.clip(lsig + disturbed(8, -128, 127), -128, 127),
        np.clip(rng.integers(0, 300, (heads, dim)), 0, 250),
        disturbed(8, -128, 127),
    )


def random_calibration(rng: np.random.Generator, planes: list[Bits], dtype: Dtype) -> Calibration:
    return Calibration(tuple(random_parameters(rng, plane, dtype) for plane in planes))
