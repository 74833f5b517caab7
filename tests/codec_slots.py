# SPDX-License-Identifier: Apache-2.0
"""Layouts, slots and records that the tests of the codec share."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.bases import BasisSums
from kvstore.calibration import Calibration, calibrate
from kvstore.codec import Codec, Profile
from kvstore.layout import TORCH_DTYPE, BlockLayout
from kvstore.moments import Moments
from kvstore.native import crc32c
from kvstore.spec import ModelSpec

GUARD = 0xA5
DTYPES = sorted(TORCH_DTYPE)
EXACT = [profile for profile in Profile if not profile.is_lossy]
LOSSY = [profile for profile in Profile if profile.is_lossy]
LARGEST = {name: torch.finfo(dtype).max for name, dtype in TORCH_DTYPE.items()}
MULTS = {Profile.Q8: 32, Profile.Q4: 16, Profile.Q3: 8, Profile.Q2: 3, Profile.PCA: 3}
LATER = 128  # a first token that is not the stream's


def make_layout(
    *, layers: int = 2, heads: int = 2, key_dim: int = 8, value_dim: int = 8, dtype: str = "bfloat16", tokens: int = 16
) -> BlockLayout:
    spec = ModelSpec(layers, heads, key_dim, value_dim, dtype, "pre", "llama", "{}", "0")
    return BlockLayout(spec, tokens)


def guarded_slot(layout: BlockLayout) -> Tensor:
    return torch.full((layout.slot_nbytes,), GUARD, dtype=torch.uint8)


def normal_slot(layout: BlockLayout, seed: int = 0) -> Tensor:
    """Values as models have them: normal, with a scale per channel."""
    generator = torch.Generator().manual_seed(seed)
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    for view in (layout.keys(slot), layout.values(slot)):
        scale = torch.exp(torch.randn(view.shape[-1], generator=generator))
        view.copy_(torch.randn(view.shape, generator=generator) * scale)
    return slot


def fitted(samples: Sequence[tuple[Tensor, Tensor]], *, with_bases: bool = False) -> Calibration:
    """The calibration of keys and values [layers, heads, tokens, dim], however few."""
    layers, heads, _, key_dim = samples[0][0].shape
    sizes = (layers, heads, key_dim, samples[0][1].shape[3])
    moments = Moments(*sizes)
    bases = BasisSums(*sizes, sum(keys.shape[2] for keys, _ in samples)) if with_bases else None
    for keys, values in samples:
        moments.add(keys, values)
        if bases is not None:
            bases.add(keys, values)
    return calibrate(moments, bases=bases, min_tokens=1)


def any_bits_slot(layout: BlockLayout, seed: int) -> Tensor:
    """Uniform bytes: NaNs with payloads, infinities, denormals and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (layout.slot_nbytes,), generator=generator, dtype=torch.uint8)


def encoded(codec: Codec, slot: Tensor, num_tokens: int, first_token: int = 0) -> bytes:
    out = bytearray(codec.bound(num_tokens))
    return bytes(out[: codec.encode(slot, num_tokens, first_token, out)])


def expected_slot(layout: BlockLayout, slot: Tensor, num_tokens: int) -> Tensor:
    """What decoding into a guarded slot must leave behind: the valid rows, and the guard everywhere else."""
    expected = guarded_slot(layout)
    for view in (layout.keys, layout.values):
        view(expected)[:, :, :num_tokens] = view(slot)[:, :, :num_tokens]
    return expected


def seal(record: bytearray) -> bytearray:
    """Make header and plane checksums right again: what a forger would do."""
    header_nbytes = struct.unpack_from("<I", record, 24)[0]
    offset = header_nbytes
    for entry in range(64, header_nbytes, 16):
        end = offset + -(-struct.unpack_from("<I", record, entry)[0] // 16) * 16
        struct.pack_into("<I", record, entry + 4, crc32c(record[offset:end]))
        offset = end
    struct.pack_into("<I", record, 8, 0)
    struct.pack_into("<I", record, 8, crc32c(record[:header_nbytes]))
    return record
