# SPDX-License-Identifier: Apache-2.0
"""The native codec behind the oracle's values: planes as element bits, records as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kvstore.calibration import Calibration as NativeCalibration
from kvstore.codec import Codec, Steps
from kvstore.codec import Profile as NativeProfile
from kvstore.layout import BlockLayout
from kvstore.native import build_info, limit_simd
from kvstore.record import DTYPES, PROFILES, probe
from kvstore.spec import ModelSpec
from tests.oracle.blocks import Geometry
from tests.oracle.calibration import Calibration
from tests.oracle.elements import Bits, Dtype
from tests.oracle.writer import Settings

ALL_LEVELS = ("baseline", "avx2", "avx512")
LEVELS = ("baseline", *(name for name in ALL_LEVELS[1:] if name in build_info()["simd"].split(",")))
_SPARE_ROWS = 3


@contextmanager
def limited_to(level: str) -> Iterator[None]:
    """Run native loops of this level and no higher one."""
    limit_simd(level)
    try:
        yield
    finally:
        limit_simd(ALL_LEVELS[-1])


def _layout(geometry: Geometry, dtype: Dtype) -> BlockLayout:
    sizes = (geometry.num_layers, geometry.kv_heads, geometry.key_dim, geometry.value_dim)
    return BlockLayout(ModelSpec(*sizes, DTYPES[dtype], "pre", "test", "{}", "0"), geometry.num_tokens + _SPARE_ROWS)


def _views(layout: BlockLayout, slot: torch.Tensor, geometry: Geometry) -> list[Bits]:
    """Writable views of a slot's planes, [H, T, dim] element bits."""
    as_integer = torch.int32 if layout.spec.itemsize == 4 else torch.int16
    kind = f"<u{layout.spec.itemsize}"
    keys, values = (view.view(as_integer).numpy().view(kind) for view in (layout.keys(slot), layout.values(slot)))
    return [(values if i % 2 else keys)[i // 2][:, : geometry.num_tokens] for i in range(2 * geometry.num_layers)]


def _calibration(calibration: Calibration | None) -> NativeCalibration | None:
    return None if calibration is None else NativeCalibration(calibration.pack())


def native_encode(
    planes: list[Bits],
    dtype: Dtype,
    settings: Settings,
    first_token: int = 0,
    calibration: Calibration | None = None,
) -> bytes:
    """The native twin of `writer.encode_record`."""
    geometry = geometry_of(planes)
    layout = _layout(geometry, dtype)
    profile = PROFILES[settings.profile]
    steps = Steps(settings.key_mult, settings.value_mult, settings.channel_values) if profile.is_lossy else None
    exact_keys = settings.exact_keys and profile.is_lossy
    codec = Codec(layout, profile, _calibration(calibration), steps, exact_keys=exact_keys)
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    for view, plane in zip(_views(layout, slot, geometry), planes, strict=True):
        view[...] = plane
    out = bytearray(codec.bound(geometry.num_tokens))
    return bytes(out[: codec.encode(slot, geometry.num_tokens, first_token, out)])


def native_decode(record: bytes, calibration: Calibration | None = None) -> list[Bits]:
    """The native twin of `record.decode_record`, with rows beyond the block's checked to be left alone."""
    info = probe(record)
    geometry = Geometry(info.num_layers, info.kv_heads, info.key_dim, info.value_dim, info.num_tokens)
    return native_decode_as(record, geometry, Dtype(DTYPES.index(info.dtype)), calibration)


def native_decode_as(
    record: bytes, geometry: Geometry, dtype: Dtype, calibration: Calibration | None = None
) -> list[Bits]:
    """The same, by a reader that knows what it wants."""
    layout = _layout(geometry, dtype)
    slot = torch.full((layout.slot_nbytes,), 0xA5, dtype=torch.uint8)
    codec = Codec(layout, NativeProfile.Q8, _calibration(calibration))
    codec.decode(record, slot, num_tokens=geometry.num_tokens)
    planes = [view.copy() for view in _views(layout, slot, geometry)]
    for view in _views(layout, slot, geometry):
        view[...] = np.full_like(view, 0xA5A5A5A5 & (1 << 8 * view.itemsize) - 1)
    assert (slot == 0xA5).all(), "bytes outside the block were written"
    return planes


def geometry_of(planes: list[Bits]) -> Geometry:
    (heads, tokens, key_dim), value_dim = planes[0].shape, planes[1].shape[2]
    return Geometry(len(planes) // 2, heads, key_dim, value_dim, tokens)
