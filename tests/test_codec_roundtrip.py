# SPDX-License-Identifier: Apache-2.0
"""Whole records: what goes in comes out, exactly or within the promised error, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.codec import Codec, Coding, Profile
from kvstore.errors import ShapeError, SpecMismatchError
from kvstore.layout import TORCH_DTYPE, BlockLayout
from kvstore.spec import ModelSpec

GUARD = 0xA5
DTYPES = sorted(TORCH_DTYPE)
EXACT = [Profile.RAW, Profile.LOSSLESS]
LARGEST = {name: torch.finfo(dtype).max for name, dtype in TORCH_DTYPE.items()}


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


@settings(max_examples=60, deadline=None)
@given(
    profile=st.sampled_from(EXACT),
    dtype=st.sampled_from(DTYPES),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    tokens=st.tuples(st.integers(1, 33), st.integers(0, 32)),
    is_normal=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_exact_profiles_give_back_every_bit_and_touch_no_other_byte(
    profile: Profile,
    dtype: str,
    layers: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    tokens: tuple[int, int],
    is_normal: bool,
    seed: int,
) -> None:
    num_tokens, spare = tokens
    layout = make_layout(
        layers=layers, heads=heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype, tokens=num_tokens + spare
    )
    slot = normal_slot(layout, seed) if is_normal else any_bits_slot(layout, seed)
    codec = Codec(layout, profile)
    destination = guarded_slot(layout)

    codec.decode(memoryview(encoded(codec, slot, num_tokens)), destination, num_tokens=num_tokens)

    assert torch.equal(destination, expected_slot(layout, slot, num_tokens))


@pytest.mark.parametrize("profile", list(Profile))
def test_the_header_says_what_the_record_holds(profile: Profile) -> None:
    layout = make_layout(layers=3, heads=2, key_dim=8, value_dim=24, dtype="float16", tokens=16)
    codec = Codec(layout, profile)

    record = encoded(codec, normal_slot(layout), 11, first_token=2**40 + 3)
    info = Codec.probe(record)

    assert (info.num_layers, info.kv_heads, info.key_dim, info.value_dim) == (3, 2, 8, 24)
    assert (info.version, info.profile, info.dtype) == ((0, 0), profile, "float16")
    assert (info.num_tokens, info.first_token, info.total_nbytes) == (11, 2**40 + 3, len(record))
    assert len(info.planes) == 6
    assert Codec.probe(record[: info.header_nbytes]) == info


def test_lossless_shrinks_values_as_models_have_them() -> None:
    layout = make_layout(layers=2, heads=4, key_dim=64, value_dim=64, tokens=64)
    record = encoded(Codec(layout, Profile.LOSSLESS), normal_slot(layout), 64)

    assert len(record) < 0.75 * layout.slot_nbytes
    assert {plane.coding for plane in Codec.probe(record).planes} == {Coding.SPLIT}


def test_planes_that_do_not_shrink_are_stored_raw_within_the_bound() -> None:
    layout = make_layout(heads=3, key_dim=33, value_dim=33, tokens=16)
    codec = Codec(layout, Profile.LOSSLESS)
    record = encoded(codec, any_bits_slot(layout, 1), 16)

    assert len(record) == codec.bound(16)
    assert {plane.coding for plane in Codec.probe(record).planes} == {Coding.RAW}


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    dim=st.integers(5, 70),
    num_tokens=st.integers(1, 20),
    exponent=st.integers(-120, 120),
    seed=st.integers(0, 1 << 30),
)
def test_q8_stays_within_half_a_step_and_the_rounding_of_the_dtype(
    dtype: str, dim: int, num_tokens: int, exponent: int, seed: int
) -> None:
    layout = make_layout(key_dim=dim, value_dim=dim, dtype=dtype, tokens=20)
    slot = normal_slot(layout, seed)
    limit = LARGEST[dtype]
    for view in (layout.keys(slot), layout.values(slot)):
        view.copy_((view.double() * 2.0**exponent).clamp(-limit, limit))
    codec = Codec(layout, Profile.Q8)
    destination = guarded_slot(layout)
    finfo = torch.finfo(TORCH_DTYPE[dtype])

    codec.decode(memoryview(encoded(codec, slot, num_tokens)), destination, num_tokens=num_tokens)

    for part in (layout.keys, layout.values):
        wanted = part(slot)[:, :, :num_tokens].double()
        found = part(destination)[:, :, :num_tokens].double()
        largest = wanted.abs().amax(-1, keepdim=True)
        rounding = found.abs() * finfo.eps + finfo.smallest_normal * finfo.eps
        assert bool(((found - wanted).abs() <= 0.51 / 127 * largest + rounding + 2.0**-100).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_q8_keeps_planes_with_infinities_or_nans_exactly(dtype: str, bad: float) -> None:
    layout = make_layout(heads=2, key_dim=32, value_dim=32, dtype=dtype, tokens=16)
    slot = normal_slot(layout)
    layout.values(slot)[1, 1, 15, 31] = bad
    codec = Codec(layout, Profile.Q8)
    destination = guarded_slot(layout)
    record = encoded(codec, slot, 16)

    codec.decode(memoryview(record), destination, num_tokens=16)

    codings = [plane.coding for plane in Codec.probe(record).planes]
    assert codings[:3] == [Coding.Q8] * 3
    assert codings[3] in (Coding.SPLIT, Coding.RAW)
    exact, found = layout.values(slot)[1], layout.values(destination)[1]
    assert torch.equal(found.contiguous().view(torch.uint8), exact.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_q8_of_the_largest_values_stays_finite(dtype: str) -> None:
    layout = make_layout(dtype=dtype)
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    layout.keys(slot).fill_(LARGEST[dtype])
    layout.values(slot).fill_(-LARGEST[dtype])
    codec = Codec(layout, Profile.Q8)
    destination = guarded_slot(layout)

    codec.decode(memoryview(encoded(codec, slot, 16)), destination, num_tokens=16)

    assert bool((layout.keys(destination).float() >= 0.99 * LARGEST[dtype]).all())
    assert bool(layout.keys(destination).isfinite().all())
    assert bool(layout.values(destination).isfinite().all())


@pytest.mark.parametrize("dim", [1, 4])
def test_q8_stores_rows_too_short_to_gain_exactly(dim: int) -> None:
    layout = make_layout(key_dim=dim, value_dim=dim)
    slot = normal_slot(layout)
    codec = Codec(layout, Profile.Q8)
    destination = guarded_slot(layout)

    codec.decode(memoryview(encoded(codec, slot, 16)), destination, num_tokens=16)

    assert torch.equal(destination, expected_slot(layout, slot, 16))


def test_a_bit_exact_codec_does_not_answer_with_a_lossy_record() -> None:
    layout = make_layout()
    record = encoded(Codec(layout, Profile.Q8), normal_slot(layout), 16)

    with pytest.raises(SpecMismatchError, match="lossy"):
        Codec(layout, Profile.LOSSLESS).decode(memoryview(record), guarded_slot(layout), num_tokens=16)


@pytest.mark.parametrize(
    "other",
    [
        make_layout(layers=1),
        make_layout(heads=1),
        make_layout(key_dim=4),
        make_layout(value_dim=4),
        make_layout(dtype="float16"),
        make_layout(dtype="float32"),
    ],
)
def test_a_record_of_another_layout_is_refused(other: BlockLayout) -> None:
    layout = make_layout()
    record = encoded(Codec(other, Profile.RAW), normal_slot(other), 16)
    destination = guarded_slot(layout)

    with pytest.raises(SpecMismatchError):
        Codec(layout, Profile.RAW).decode(memoryview(record), destination, num_tokens=16)
    assert torch.equal(destination, guarded_slot(layout))


def test_a_record_fits_slots_with_more_room_but_not_with_less() -> None:
    small, large = make_layout(tokens=8), make_layout(tokens=32)
    slot = normal_slot(small)
    record = encoded(Codec(small, Profile.LOSSLESS), slot, 8)
    destination = guarded_slot(large)

    Codec(large, Profile.LOSSLESS).decode(memoryview(record), destination, num_tokens=8)

    assert torch.equal(large.keys(destination)[:, :, :8], small.keys(slot))
    tiny = make_layout(tokens=7)
    with pytest.raises(ShapeError):
        Codec(tiny, Profile.LOSSLESS).decode(memoryview(record), guarded_slot(tiny), num_tokens=8)


@pytest.mark.parametrize("num_tokens", [-1, 0, 17])
def test_token_counts_outside_the_slot_are_refused(num_tokens: int) -> None:
    layout = make_layout()
    codec = Codec(layout, Profile.RAW)

    with pytest.raises(ShapeError):
        codec.bound(num_tokens)
    with pytest.raises(ShapeError):
        codec.encode(normal_slot(layout), num_tokens, 0, bytearray(1 << 16))


@pytest.mark.parametrize("profile", list(Profile))
def test_too_small_an_output_is_refused(profile: Profile) -> None:
    layout = make_layout(key_dim=32, value_dim=32)
    codec = Codec(layout, profile)
    needed = len(encoded(codec, normal_slot(layout), 16))
    out = bytearray(needed - 1)

    with pytest.raises(ShapeError):
        codec.encode(normal_slot(layout), 16, 0, out)


def test_slots_and_outputs_of_the_wrong_kind_are_refused() -> None:
    layout = make_layout()
    codec = Codec(layout, Profile.RAW)
    out = bytearray(codec.bound(16))

    for slot in (torch.zeros(layout.slot_nbytes - 1, dtype=torch.uint8), torch.zeros(layout.slot_nbytes)):
        with pytest.raises(ShapeError):
            codec.encode(slot, 16, 0, out)
    with pytest.raises(ShapeError):
        codec.encode(normal_slot(layout), 16, 0, bytes(out))
    with pytest.raises(ShapeError):
        codec.encode(normal_slot(layout), 16, -1, out)
