# SPDX-License-Identifier: Apache-2.0
"""Loops for newer CPUs against the plain ones: the same bytes, encoded and decoded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec import Codec, Profile, Steps
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.native import build_info, limit_simd
from kvstore.spec import ModelSpec
from tests.codec_slots import fitted

LEVELS = ["baseline", "avx2", "avx512"]


@pytest.fixture(autouse=True)
def restored_level() -> Iterator[None]:
    yield
    limit_simd("avx512")


def make_slot(layout: BlockLayout, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "bits":
        return torch.randint(0, 256, (layout.slot_nbytes,), generator=generator, dtype=torch.uint8)
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    for view in (layout.keys(slot), layout.values(slot)):
        channel = torch.exp2(torch.randn(view.shape[-1], generator=generator))
        token = torch.exp2(torch.randn(view.shape[2], 1, generator=generator) * 4)
        offset = torch.randn(view.shape[-1], generator=generator)
        noise = torch.randn(view.shape, generator=generator)
        view.copy_(noise * channel * (token if kind == "spread" else 1) + offset)
    return slot


@settings(max_examples=60, deadline=None)
@given(
    profile=st.sampled_from([Profile.LOSSLESS, Profile.Q8, Profile.Q4, Profile.Q3, Profile.Q2]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    layers=st.integers(1, 4),
    heads=st.integers(1, 4),
    key_dim=st.integers(1, 150),
    value_dim=st.integers(1, 150),
    tokens=st.integers(1, 70),
    kind=st.sampled_from(["normal", "spread", "bits"]),
    is_calibrated=st.booleans(),
    has_channel_values=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_all_levels_make_the_same_bytes(
    profile: Profile,
    dtype: str,
    layers: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    tokens: int,
    kind: str,
    is_calibrated: bool,
    has_channel_values: bool,
    seed: int,
) -> None:
    layout = BlockLayout(ModelSpec(layers, heads, key_dim, value_dim, dtype, "pre", "llama", "{}", "0"), tokens)
    slot = make_slot(layout, kind, seed)
    calibration = None
    if is_calibrated and tokens > 1:
        example = make_slot(layout, "normal", seed)
        calibration = fitted([(layout.keys(example).float(), layout.values(example).float())])
    mult = {Profile.Q8: 32, Profile.Q4: 16, Profile.Q3: 8, Profile.Q2: 3}.get(profile)
    steps = None if mult is None else Steps(mult, mult - 4, has_channel_values)
    codec = Codec(layout, profile, calibration, steps)
    records, slots = [], []
    for level in LEVELS:
        limit_simd(level)
        out = bytearray(codec.bound(tokens))
        records.append(bytes(out[: codec.encode(slot, tokens, seed % 2, out)]))
        slots.append(torch.zeros_like(slot))
        codec.decode(records[0], slots[-1], num_tokens=tokens)

    assert records[1:] == records[:-1]
    assert all(torch.equal(found, slots[0]) for found in slots)


def test_the_level_in_use_is_told() -> None:
    limit_simd("baseline")
    assert "avx" not in build_info()["simd"]
    with pytest.raises(ConfigError):
        limit_simd("neon")
