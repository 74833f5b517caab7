# SPDX-License-Identifier: Apache-2.0
"""Bytes that are cut off, damaged or made up: always a typed error, never a crash, never a different tensor."""

from __future__ import annotations

import struct

import pytest
import torch
import zstandard

from kvstore.codec import Codec, Profile
from kvstore.errors import CorruptRecordError, SpecMismatchError, UnsupportedFormatError
from kvstore.layout import BlockLayout
from kvstore.native import crc32c
from kvstore.spec import ModelSpec
from tests.codec_slots import seal

TOKENS = 4
SMALL = BlockLayout(ModelSpec(1, 1, 16, 16, "bfloat16", "pre", "llama", "{}", "0"), TOKENS)
LARGE = BlockLayout(ModelSpec(1, 2, 64, 64, "bfloat16", "pre", "llama", "{}", "0"), 16)
REFUSALS = (CorruptRecordError, UnsupportedFormatError)


def make_slot(layout: BlockLayout) -> torch.Tensor:
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    for view in (layout.keys(slot), layout.values(slot)):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(1)))
    return slot


def make_record(layout: BlockLayout, profile: Profile) -> bytearray:
    codec = Codec(layout, profile)
    out = bytearray(codec.bound(layout.block_tokens))
    return out[: codec.encode(make_slot(layout), layout.block_tokens, 7, out)]


def decode(layout: BlockLayout, record: bytes | bytearray, profile: Profile) -> torch.Tensor:
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    Codec(layout, profile).decode(memoryview(record), slot, num_tokens=layout.block_tokens)
    return slot


@pytest.mark.parametrize("profile", list(Profile))
def test_truncation_at_every_length_is_reported(profile: Profile) -> None:
    record = make_record(SMALL, profile)
    for length in range(len(record)):
        with pytest.raises(CorruptRecordError):
            decode(SMALL, record[:length], profile)


@pytest.mark.parametrize("profile", list(Profile))
def test_every_single_flipped_bit_is_reported(profile: Profile) -> None:
    record = make_record(SMALL, profile)
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(REFUSALS):
            decode(SMALL, damaged, profile)


def test_bytes_after_the_record_are_not_read() -> None:
    record = make_record(SMALL, Profile.LOSSLESS)

    assert torch.equal(decode(SMALL, record + b"\xff" * 99, Profile.LOSSLESS), make_slot(SMALL))


def test_another_count_of_tokens_is_reported() -> None:
    record = make_record(SMALL, Profile.RAW)

    with pytest.raises(CorruptRecordError, match="holds 4 tokens; 3 were expected"):
        Codec(SMALL, Profile.RAW).decode(memoryview(record), make_slot(SMALL), num_tokens=3)


# offset in the header, struct code, value, expected error, part of its message
HEADER_FORGERIES = [
    (0, "B", 0, CorruptRecordError, "KVX1"),
    (4, "B", 0, UnsupportedFormatError, "version 0"),
    (4, "B", 2, UnsupportedFormatError, "version 2"),
    (6, "H", 0, CorruptRecordError, "size of 0"),
    (12, "I", 1, UnsupportedFormatError, "flags"),
    (12, "I", 0x8000, UnsupportedFormatError, "flags"),
    (16, "Q", 0, CorruptRecordError, "in all"),
    (16, "Q", 2**64 - 1, CorruptRecordError, "in all"),
    (28, "B", 3, UnsupportedFormatError, "dtype"),
    (29, "B", 8, UnsupportedFormatError, "profile"),
    (29, "B", 1, CorruptRecordError, "profile"),
    (30, "H", 0, CorruptRecordError, "planes"),
    (30, "H", 65535, CorruptRecordError, "planes"),
    (32, "H", 0, CorruptRecordError, "size of 0"),
    (32, "H", 65535, SpecMismatchError, "layout"),
    (36, "H", 65535, CorruptRecordError, "V of layer 0"),
    (38, "H", 65535, CorruptRecordError, "were expected"),
    (64, "I", 2**32 - 1, CorruptRecordError, "K of layer 0"),
    (64, "I", 0, CorruptRecordError, "checksum|sections|in all"),
    (72, "B", 4, CorruptRecordError, "coding|entry"),
    (72, "B", 5, UnsupportedFormatError, "coding"),
    (72, "B", 0, CorruptRecordError, "K of layer 0"),
    (73, "B", 1, CorruptRecordError, "entry"),
    (74, "b", -1, CorruptRecordError, "entry"),
    (75, "B", 1, CorruptRecordError, "entry"),
    (76, "B", 1, CorruptRecordError, "entry"),
    (77, "B", 1, CorruptRecordError, "entry"),
    (78, "H", 0, CorruptRecordError, "entry"),
    (78, "H", 3, CorruptRecordError, "entry"),
]

QUANTISED_FORGERIES = [
    (73, "B", 0x40, UnsupportedFormatError, "transform"),
    (73, "B", 0x03, UnsupportedFormatError, "transform"),
    (73, "B", 0x31, CorruptRecordError, "entry"),
    (73, "B", 0x3C, CorruptRecordError, "entry"),
    (73, "B", 0x00, CorruptRecordError, "entry"),
    (73, "B", 0x10, CorruptRecordError, "calibration"),
    (73, "B", 0x2C, CorruptRecordError, "entry"),
    (73, "B", 0x21, CorruptRecordError, "K of layer 0"),
    (75, "B", 4, CorruptRecordError, "entry"),
    (75, "B", 3, CorruptRecordError, "sections|section"),
    (76, "B", 5, CorruptRecordError, "entry"),
    (76, "B", 4, CorruptRecordError, "sections|section"),
    (77, "B", 1, CorruptRecordError, "entry"),
    (93, "B", 16, CorruptRecordError, "entry"),
    (93, "B", 255, CorruptRecordError, "sections|section"),
    (78, "H", 0, CorruptRecordError, "entry"),
]


@pytest.mark.parametrize(("at", "code", "value", "error", "text"), HEADER_FORGERIES)
def test_forged_header_fields_with_a_right_checksum_are_refused(
    at: int, code: str, value: int, error: type[Exception], text: str
) -> None:
    record = make_record(LARGE, Profile.LOSSLESS)
    header_nbytes = Codec.probe(record).header_nbytes
    struct.pack_into("<" + code, record, at, value)
    struct.pack_into("<I", record, 8, 0)
    struct.pack_into("<I", record, 8, crc32c(record[:header_nbytes]))

    with pytest.raises(error, match=text):
        decode(LARGE, record, Profile.LOSSLESS)


@pytest.mark.parametrize(("at", "code", "value", "error", "text"), QUANTISED_FORGERIES)
def test_forged_entries_of_quantised_planes_are_refused(
    at: int, code: str, value: int, error: type[Exception], text: str
) -> None:
    record = make_record(LARGE, Profile.Q4)
    struct.pack_into("<" + code, record, at, value)

    with pytest.raises(error, match=text):
        decode(LARGE, seal(record), Profile.Q4)


@pytest.mark.parametrize("profile", [Profile.LOSSLESS, Profile.Q8, Profile.Q2])
def test_forged_payloads_with_right_checksums_never_crash(profile: Profile) -> None:
    record = make_record(LARGE, profile)
    refused = 0
    for position in range(Codec.probe(record).header_nbytes, len(record)):
        damaged = bytearray(record)
        damaged[position] ^= 1 << position % 8
        try:
            decode(LARGE, seal(damaged), profile)
        except CorruptRecordError:
            refused += 1

    assert refused > 0.4 * (len(record) - Codec.probe(record).header_nbytes) or profile is Profile.LOSSLESS


def test_newer_minor_versions_and_ignorable_flags_are_accepted() -> None:
    record = make_record(LARGE, Profile.LOSSLESS)
    record[5] = 9
    struct.pack_into("<I", record, 12, 0xFFFF0000)
    seal(record)

    assert Codec.probe(record).version == (1, 9)
    assert torch.equal(decode(LARGE, record, Profile.LOSSLESS), make_slot(LARGE))


def replace_k_plane(payload: bytes) -> bytearray:
    """A record of LARGE whose K plane of coding split has another payload, with all sums and checksums right."""
    record = make_record(LARGE, Profile.ZSTD)
    info = Codec.probe(record)
    stored_value = record[info.planes[1].offset :]
    record[info.header_nbytes :] = payload + bytes(-len(payload) % 16) + stored_value
    struct.pack_into("<I", record, 64, len(payload))
    struct.pack_into("<Q", record, 16, len(record))
    return seal(record)


ELEMENTS = 2 * 16 * 64
NOISE = torch.randint(0, 256, (ELEMENTS,), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
PLAIN = NOISE.numpy().tobytes()
FRAME = zstandard.compress(bytes(ELEMENTS))
BOMB = zstandard.compress(bytes(1 << 24))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(ELEMENTS))
SHORT = zstandard.compress(bytes(ELEMENTS - 1))


def split_payload(low: bytes, high: bytes) -> bytes:
    return struct.pack("<II", len(low), len(high)) + low + high


def test_a_rebuilt_plane_is_decoded() -> None:
    slot = decode(LARGE, replace_k_plane(split_payload(PLAIN, FRAME)), Profile.ZSTD)

    # High stream 0 leaves the low stream: 7 mantissa bits above the sign.
    low = NOISE.view(2, 16, 64).to(torch.int32)
    expected = ((low >> 1) | ((low & 1) << 15)).to(torch.int16)
    assert torch.equal(LARGE.keys(slot)[0].contiguous().view(torch.int16), expected)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0" * 8,
        struct.pack("<II", 2**32 - 1, 1) + b"x",
        struct.pack("<II", 0, len(FRAME)) + FRAME,
        struct.pack("<II", ELEMENTS, len(FRAME)) + PLAIN + FRAME + b"x",
        struct.pack("<II", ELEMENTS, len(FRAME) + 1) + PLAIN + FRAME,
        split_payload(PLAIN, BOMB),
        split_payload(PLAIN, UNSIZED),
        split_payload(PLAIN, SHORT),
        split_payload(PLAIN, FRAME + b"x"),
        split_payload(PLAIN, FRAME[:-1]),
        split_payload(PLAIN, FRAME + FRAME),
        split_payload(PLAIN, b"not a frame"),
    ],
    ids=[
        "empty", "zero-lengths", "huge-length", "zero-length", "spare-byte", "length-beyond", "bomb", "no-size",
        "short", "trailing", "cut", "two-frames", "no-frame",
    ],
)  # fmt: skip
def test_forged_streams_with_right_checksums_are_refused(payload: bytes) -> None:
    with pytest.raises(CorruptRecordError, match="K of layer 0"):
        decode(LARGE, replace_k_plane(payload), Profile.ZSTD)


@pytest.mark.parametrize("profile", [Profile.RAW, Profile.ZSTD, Profile.Q4])
def test_a_directory_from_another_record_is_refused(profile: Profile) -> None:
    record = make_record(LARGE, Profile.LOSSLESS)
    other = Codec.probe(make_record(LARGE, profile))

    with pytest.raises(CorruptRecordError):
        Codec(LARGE, profile).decode_planes(other, record, 0, make_slot(LARGE), layers=range(1))
