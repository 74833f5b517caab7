# SPDX-License-Identifier: Apache-2.0
"""Calibration objects: what they describe, what they save, and what becomes of damaged or foreign ones."""

from __future__ import annotations

import struct

import pytest
import torch

from kvstore.calibration import Calibration
from kvstore.codec import Codec, Profile
from kvstore.errors import CorruptRecordError, KVStoreError, SpecMismatchError, UnsupportedFormatError
from kvstore.layout import BlockLayout
from kvstore.native import crc32c
from kvstore.record import STEPS
from kvstore.spec import ModelSpec
from tests.codec_slots import fitted

LAYERS, HEADS, DIM, TOKENS = 2, 3, 64, 128
LAYOUT = BlockLayout(ModelSpec(LAYERS, HEADS, DIM, DIM, "bfloat16", "pre", "llama", "{}", "0"), TOKENS)


def make_text(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with means, deviations and memory per channel; values without."""
    fixed = torch.Generator().manual_seed(1)
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, HEADS, 1, DIM)
    mean, sigma = torch.randn(shape, generator=fixed) * 3, torch.exp2(torch.randn(shape, generator=fixed) * 0.5)
    rho = torch.rand(shape, generator=fixed) * 0.9
    noise = torch.randn(LAYERS, HEADS, tokens, DIM, generator=generator)
    state = torch.zeros(LAYERS, HEADS, 1, DIM)
    keys = torch.empty_like(noise)
    for token in range(tokens):
        state = rho * state + (1 - rho.square()).sqrt() * noise[:, :, token : token + 1]
        keys[:, :, token : token + 1] = mean + sigma * state
    return keys, torch.randn(LAYERS, HEADS, tokens, DIM, generator=generator)


def make_slot() -> torch.Tensor:
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    keys, values = make_text(9, TOKENS)
    LAYOUT.keys(slot).copy_(keys)
    LAYOUT.values(slot).copy_(values)
    return slot


CALIBRATION = fitted([make_text(1, 1024), make_text(2, 512)])


def record_nbytes(codec: Codec) -> int:
    return codec.encode(make_slot(), TOKENS, TOKENS, bytearray(codec.bound(TOKENS)))


@pytest.mark.parametrize("profile", [Profile.Q8, Profile.Q4, Profile.Q3, Profile.Q2])
def test_it_makes_lossy_records_smaller_and_better(profile: Profile) -> None:
    sizes, errors = [], []
    for calibration in (None, CALIBRATION):
        codec = Codec(LAYOUT, profile, calibration, STEPS[profile])
        out = bytearray(codec.bound(TOKENS))
        sizes.append(codec.encode(make_slot(), TOKENS, TOKENS, out))
        slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
        codec.decode(out, slot, num_tokens=TOKENS)
        errors.append((LAYOUT.keys(slot).float() - LAYOUT.keys(make_slot()).float()).square().mean().item())

    assert sizes[1] < 0.98 * sizes[0]
    assert errors[1] < 0.9 * errors[0]


def test_equal_bytes_have_equal_ids_and_others_do_not() -> None:
    again = fitted([make_text(1, 1024), make_text(2, 512)])

    assert again.id == CALIBRATION.id == Calibration(CALIBRATION.data).id
    assert fitted([make_text(1, 1024)]).id != CALIBRATION.id


@pytest.mark.parametrize("other", [None, fitted([make_text(3, 64)])])
def test_a_record_is_read_only_with_the_calibration_it_was_written_with(other: Calibration | None) -> None:
    codec = Codec(LAYOUT, Profile.Q4, CALIBRATION)
    out = bytearray(codec.bound(TOKENS))
    codec.encode(make_slot(), TOKENS, 0, out)

    assert Codec.probe(out).calibration_id == CALIBRATION.id
    with pytest.raises(SpecMismatchError, match=CALIBRATION.id.hex()):
        Codec(LAYOUT, Profile.Q4, other).decode(out, make_slot(), num_tokens=TOKENS)


def test_a_calibrated_codec_reads_what_was_written_without() -> None:
    plain = Codec(LAYOUT, Profile.Q4)
    out = bytearray(plain.bound(TOKENS))
    plain.encode(make_slot(), TOKENS, 0, out)
    found, wanted = make_slot(), make_slot()

    plain.decode(out, wanted, num_tokens=TOKENS)
    Codec(LAYOUT, Profile.Q4, CALIBRATION).decode(out, found, num_tokens=TOKENS)

    assert torch.equal(found, wanted)


def test_exact_profiles_need_none() -> None:
    assert record_nbytes(Codec(LAYOUT, Profile.LOSSLESS, CALIBRATION)) == record_nbytes(Codec(LAYOUT, Profile.LOSSLESS))
    codec = Codec(LAYOUT, Profile.LOSSLESS, CALIBRATION)
    out = bytearray(codec.bound(TOKENS))
    codec.encode(make_slot(), TOKENS, 0, out)
    assert Codec.probe(out).calibration_id == bytes(16)


def test_one_of_another_geometry_is_refused() -> None:
    spec = ModelSpec(LAYERS + 1, HEADS, DIM, DIM, "bfloat16", "pre", "llama", "{}", "0")

    with pytest.raises(SpecMismatchError):
        Codec(BlockLayout(spec, TOKENS), Profile.Q4, CALIBRATION)


def seal(data: bytearray) -> bytes:
    struct.pack_into("<I", data, 8, 0)
    struct.pack_into("<I", data, 8, crc32c(data))
    return bytes(data)


def test_every_cut_and_every_flipped_byte_is_reported() -> None:
    keys, values = make_text(1, 4)
    data = fitted([(keys[:1, :1, :, :3], values[:1, :1, :, :2])]).data

    for length in range(len(data)):
        with pytest.raises(CorruptRecordError):
            Calibration(data[:length])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x81
        with pytest.raises((CorruptRecordError, UnsupportedFormatError)):
            Calibration(bytes(damaged))


@pytest.mark.parametrize(
    ("at", "code", "value", "error"),
    [
        (0, "B", 0, CorruptRecordError),
        (4, "B", 2, UnsupportedFormatError),
        (12, "I", 1, CorruptRecordError),
        (12, "I", 2, UnsupportedFormatError),
        (16, "Q", 2**64 - 1, CorruptRecordError),
        (24, "H", 0, CorruptRecordError),
        (24, "H", 65535, CorruptRecordError),
        (26, "H", 65535, CorruptRecordError),
        (30, "H", 0, CorruptRecordError),
        (32, "h", 1001, CorruptRecordError),
        (32 + 2 * HEADS, "H", 0x7F80, CorruptRecordError),
        (32 + 2 * HEADS + 4 * HEADS * DIM, "B", 251, CorruptRecordError),
    ],
)
def test_forged_fields_with_a_right_checksum_are_refused(
    at: int, code: str, value: int, error: type[KVStoreError]
) -> None:
    data = bytearray(CALIBRATION.data)
    struct.pack_into("<" + code, data, at, value)

    with pytest.raises(error):
        Calibration(seal(data))


def test_constant_channels_are_calibrated_too() -> None:
    keys, values = torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)

    assert len(fitted([(keys, values)]).id) == 16


def test_a_record_without_calibrated_planes_names_no_calibration() -> None:
    # Planes of one element: states alone would be longer, so all are stored raw.
    layout = BlockLayout(ModelSpec(1, 1, 1, 1, "bfloat16", "pre", "llama", "{}", "0"), 1)
    calibration = fitted([(torch.randn(1, 1, 256, 1), torch.randn(1, 1, 256, 1))])
    slot = torch.ones(layout.slot_nbytes, dtype=torch.uint8)
    codec = Codec(layout, Profile.Q8, calibration)
    out = bytearray(codec.bound(1))
    codec.encode(slot, 1, 7, out)
    found = torch.zeros_like(slot)

    Codec(layout, Profile.Q8).decode(out, found, num_tokens=1)

    assert Codec.probe(out).calibration_id == bytes(16)
    assert torch.equal(layout.keys(found), layout.keys(slot))
