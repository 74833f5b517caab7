# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md, followed by hand: records are built and read here without the codec, and must agree with it."""

from __future__ import annotations

import struct

import pytest
import torch
import zstandard

from kvstore.codec import Codec, Coding, Profile, header_nbytes
from kvstore.errors import UnsupportedFormatError
from kvstore.layout import BlockLayout
from kvstore.native import crc32c_table
from kvstore.spec import ModelSpec

HEADS, KEY_DIM, VALUE_DIM, TOKENS = 2, 3, 5, 3
FROZEN_RAW = (
    "4b565831010001004287b5df0000000080000000000000006000000000000100"
    "0100010002000100090000000000000000000000000000000000000000000000"
    "02000000a503cd5f000000000000000004000000385fb3160000000000000000"
    "803f00000000000000000000000000000040c0c0000000000000000000000000"
)
DTYPES = {"bfloat16": (0, 2), "float16": (1, 2), "float32": (2, 4)}


def make_layout(dtype: str, *, dim: int = 0) -> BlockLayout:
    spec = ModelSpec(2, HEADS, dim or KEY_DIM, dim or VALUE_DIM, dtype, "pre", "llama", "{}", "0")
    return BlockLayout(spec, TOKENS + 1)


def counting_slot(layout: BlockLayout) -> torch.Tensor:
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    for sign, view in ((1, layout.keys(slot)), (-1, layout.values(slot))):
        view.copy_(sign * torch.arange(view.numel()).reshape(view.shape) * 0.25)
    return slot


def planes_of(layout: BlockLayout, slot: torch.Tensor) -> list[bytes]:
    """Raw bytes of K0, V0, K1, V1: [heads, tokens, dim]."""
    return [
        view[layer, :, :TOKENS].contiguous().view(torch.uint8).numpy().tobytes()
        for layer in range(2)
        for view in (layout.keys(slot), layout.values(slot))
    ]


def raw_record(dtype: str, planes: list[bytes]) -> bytes:
    header = 64 + 16 * len(planes)
    directory, body = b"", b""
    for plane in planes:
        stored = plane + bytes(-len(plane) % 16)
        directory += struct.pack("<II8x", len(plane), crc32c_table(stored))
        body += stored
    number, _ = DTYPES[dtype]

    def head(crc: int) -> bytes:
        fields = struct.pack("<IQIBBHHHHHQ", 0, header + len(body), header, number, 0, 2, HEADS, 3, 5, TOKENS, 77)
        return b"KVX1" + struct.pack("<BBHI", 1, 0, TOKENS, crc) + fields + bytes(16)

    return head(crc32c_table(head(0) + directory)) + directory + body


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_raw_record_is_what_the_format_says_byte_for_byte(dtype: str) -> None:
    layout = make_layout(dtype)
    slot = counting_slot(layout)
    codec = Codec(layout, Profile.RAW)
    out = bytearray(codec.bound(TOKENS))

    nbytes = codec.encode(slot, TOKENS, 77, out)

    assert bytes(out[:nbytes]) == raw_record(dtype, planes_of(layout, slot))


def test_a_frozen_record_of_version_1_decodes() -> None:
    layout = BlockLayout(ModelSpec(1, 1, 1, 2, "bfloat16", "pre", "llama", "{}", "0"), 1)
    record = bytes.fromhex(FROZEN_RAW)
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)

    Codec(layout, Profile.LOSSLESS).decode(record, slot, num_tokens=1)

    assert layout.keys(slot).tolist() == [[[[1.0]]]]
    assert layout.values(slot).tolist() == [[[[2.0, -6.0]]]]
    assert Codec.probe(record).first_token == 9


def test_a_record_of_version_0_is_unsupported() -> None:
    record = bytearray(bytes.fromhex(FROZEN_RAW))
    record[4] = 0

    with pytest.raises(UnsupportedFormatError, match="version 0"):
        Codec.probe(record)


def read_split(stored: bytes, itemsize: int, elements: int) -> bytes:
    lengths = struct.unpack_from(f"<{itemsize}I", stored)
    at, streams = 4 * itemsize, []
    for length in lengths:
        stream = stored[at : at + length]
        streams.append(stream if length == elements else zstandard.decompress(stream))
        at += length
    assert at == len(stored)
    bits = 8 * itemsize
    plain = b""
    for element in zip(*streams, strict=True):
        rotated = int.from_bytes(bytes(element), "little")
        plain += ((rotated >> 1) | ((rotated & 1) << (bits - 1))).to_bytes(itemsize, "little")
    return plain


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_split_planes_read_by_hand_hold_the_elements(dtype: str) -> None:
    layout = make_layout(dtype, dim=40)
    slot = counting_slot(layout)
    codec = Codec(layout, Profile.ZSTD)
    out = bytearray(codec.bound(TOKENS))
    codec.encode(slot, TOKENS, 0, out)
    info = Codec.probe(out)
    itemsize = DTYPES[dtype][1]

    assert [plane.coding for plane in info.planes] == [Coding.SPLIT] * 4
    for plane, raw in zip(info.planes, planes_of(layout, slot), strict=True):
        stored = bytes(out[plane.offset : plane.offset + plane.nbytes])
        assert read_split(stored, itemsize, len(raw) // itemsize) == raw


def test_the_header_length_follows_from_the_layers() -> None:
    layout = make_layout("bfloat16")
    codec = Codec(layout, Profile.RAW)
    out = bytearray(codec.bound(TOKENS))
    codec.encode(counting_slot(layout), TOKENS, 0, out)

    assert Codec.probe(out).header_nbytes == header_nbytes(2)
