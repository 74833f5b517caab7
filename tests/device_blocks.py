# SPDX-License-Identifier: Apache-2.0
"""Records that the tests of the device's decoder share, and how they are decoded on a device or in lock step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvstore.calibration import Calibration, calibrate
from kvstore.codec import Codec, Profile, Steps
from kvstore.errors import CorruptRecordError
from kvstore.layout import TORCH_DTYPE, BlockLayout
from kvstore.moments import Moments
from kvstore.native import build_info
from kvstore.record import RecordInfo
from kvstore.tiers.device.decode import DeviceRecord, Pages, decode_on_device
from tests.codec_slots import LATER, encoded, make_layout, normal_slot

GUARD = 42.0


def run(records: list[DeviceRecord], device: torch.device) -> list[CorruptRecordError | None]:
    if device.type == "cpu":
        return decode_on_device(records)
    if build_info()["cuda_devices"] == 0:
        pytest.skip("the native part sees no device, or was built without")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return decode_on_device(records, stream)


def bits(rows: Tensor) -> Tensor:
    """The same elements as integers: NaNs are equal only so."""
    return rows.cpu().contiguous().view(torch.int32 if rows.itemsize == 4 else torch.int16)


def rugged_slot(layout: BlockLayout, seed: int = 0) -> Tensor:
    """Normal values with what no alphabet holds: spikes, infinities, NaNs, denormals, a row of zeros."""
    slot = normal_slot(layout, seed)
    chance = torch.Generator().manual_seed(seed)
    for view in (layout.keys(slot), layout.values(slot)):
        for value in (1e4, float("inf"), float("-inf"), float("nan"), 1e-7, -0.0):
            where = torch.rand(view.shape, generator=chance) < 0.002
            view[where] = value
        view[:, :, -1] = 0
    return slot


def make_calibration(layout: BlockLayout, slot: Tensor) -> Calibration:
    """Of the slot itself, with steps that differ from channel to channel."""
    spec = layout.spec
    moments = Moments(spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim)
    moments.add(*(part(slot).float().nan_to_num(0, 0, 0) for part in (layout.keys, layout.values)))
    chance = torch.Generator().manual_seed(1)
    steps = [
        torch.randint(-9, 10, (spec.num_layers, spec.kv_heads, dim), generator=chance, dtype=torch.int8)
        for dim in (spec.key_dim, spec.value_dim)
    ]
    return calibrate(moments, (steps[0], steps[1]), min_tokens=1)


@dataclass(frozen=True)
class Block:
    """A record and its decoder."""

    codec: Codec
    record: bytes
    num_tokens: int

    @property
    def info(self) -> RecordInfo:
        return Codec.probe(self.record)

    def host(self, layers: range | None = None) -> tuple[Tensor, Tensor]:
        """[layers, heads, tokens, dim], by the host's decoder."""
        info = self.info
        layers = layers or range(info.num_layers)
        keys, values = (
            torch.zeros(len(layers), info.kv_heads, info.num_tokens, dim, dtype=TORCH_DTYPE[info.dtype])
            for dim in (info.key_dim, info.value_dim)
        )
        heads, tokens = range(info.kv_heads), range(info.num_tokens)
        self.codec.decode_rows(info, self.record, 0, keys, values, layers=layers, heads=heads, tokens=tokens)
        return keys, values

    def to(
        self, keys: Tensor, values: Tensor, *, layers: range | None = None, pages: Pages | None = None
    ) -> DeviceRecord:
        info = self.info
        return DeviceRecord(
            self.codec, info, self.record, 0, layers or range(info.num_layers), list(keys), list(values), pages
        )

    def empty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        info = self.info
        shape = (info.num_layers, info.kv_heads, info.num_tokens)
        dtype = TORCH_DTYPE[info.dtype]
        return (
            torch.full((*shape, info.key_dim), GUARD, dtype=dtype, device=device),
            torch.full((*shape, info.value_dim), GUARD, dtype=dtype, device=device),
        )


def make_block(
    profile: Profile,
    *,
    layout: BlockLayout | None = None,
    num_tokens: int = 150,
    first_token: int = LATER,
    is_calibrated: bool = False,
    steps: Steps | None = None,
    slot: Tensor | None = None,
) -> Block:
    layout = layout or make_layout(heads=3, key_dim=80, value_dim=37, tokens=num_tokens)
    slot = rugged_slot(layout) if slot is None else slot
    calibration = make_calibration(layout, slot) if is_calibrated else None
    codec = Codec(layout, profile, calibration, steps)
    return Block(codec, encoded(codec, slot, num_tokens, first_token), num_tokens)
