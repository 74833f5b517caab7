# SPDX-License-Identifier: Apache-2.0
"""Damaged and forged records, and targets that do not fit: the device's decoder answers as the host's does."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kvstore.codec import Profile
from kvstore.errors import ConfigError, CorruptRecordError, ShapeError, UnsupportedFormatError
from kvstore.tiers.device.decode import Pages, decode_on_device
from tests.codec_slots import make_layout, seal
from tests.device_blocks import GUARD, bits, make_block, run

ENTROPY_CODED = [Profile.LOSSLESS, Profile.Q8, Profile.Q4, Profile.Q3, Profile.Q2]


def test_a_batch_mixes_records_of_all_kinds_and_a_damaged_one_harms_no_other(device: torch.device) -> None:
    blocks = [make_block(profile, num_tokens=tokens) for profile in ENTROPY_CODED for tokens in (3, 70)]
    broken = bytearray(blocks[4].record)
    broken[-40] ^= 1
    blocks[4] = replace(blocks[4], record=bytes(broken))
    targets = [block.empty(device) for block in blocks]

    found = run([block.to(*target) for block, target in zip(blocks, targets, strict=True)], device)

    for index, (block, target, error) in enumerate(zip(blocks, targets, found, strict=True)):
        if index == 4:
            assert isinstance(error, CorruptRecordError)
            assert "V of layer 1" in str(error)
            assert all(bool((each == GUARD).all()) for each in target)
            continue
        assert error is None
        for rows, wanted in zip(target, block.host(), strict=True):
            assert torch.equal(bits(rows), bits(wanted))


def forgeries(record: bytes) -> Iterator[bytes]:
    """Flipped bytes, numbers that are one too large, numbers that repeat their neighbour; checksums are right."""
    chance = torch.Generator().manual_seed(2)
    for position in torch.randint(64, len(record), (150,), generator=chance).tolist():
        forged = bytearray(record)
        forged[position] ^= int(torch.randint(1, 256, (1,), generator=chance))
        yield bytes(seal(forged))
    for position in range(64, len(record) - 4, 4):
        forged = bytearray(record)
        (number,) = struct.unpack_from("<I", forged, position)
        struct.pack_into("<I", forged, position, (number + 1) % (1 << 32))
        yield bytes(seal(forged))
    for position in range(64, len(record) - 4, 2):
        forged = bytearray(record)
        forged[position : position + 2] = forged[position + 2 : position + 4]
        yield bytes(seal(forged))


@pytest.mark.parametrize("profile", [Profile.LOSSLESS, Profile.Q8, Profile.Q2])
def test_forgeries_get_the_same_answer_as_on_the_host(profile: Profile, device: torch.device) -> None:
    layout = make_layout(layers=1, heads=2, key_dim=40, value_dim=24, tokens=24)
    block = make_block(profile, layout=layout, num_tokens=24, is_calibrated=profile is Profile.Q8)
    answers = set()
    for forged in forgeries(block.record):
        fake = replace(block, record=forged)
        wanted = None
        try:
            wanted = fake.host()
        except UnsupportedFormatError:
            continue
        except CorruptRecordError as refusal:
            if "segment" not in str(refusal):
                continue  # found before anything is decoded, by the code that both share
        keys, values = block.empty(device)
        (error,) = run([fake.to(keys, values)], device)
        answers.add(error is None)
        assert (error is None) == (wanted is not None), error
        if wanted is not None:
            assert torch.equal(bits(keys), bits(wanted[0]))
            assert torch.equal(bits(values), bits(wanted[1]))
    assert answers == {True, False}


def test_streams_that_only_the_host_can_decompress_are_refused() -> None:
    layout = make_layout(tokens=64)
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    block = make_block(Profile.ZSTD, layout=layout, num_tokens=64, slot=slot)
    with pytest.raises(ConfigError, match="zstd"):
        run([block.to(*block.empty(torch.device("cpu")))], torch.device("cpu"))


@pytest.mark.parametrize(
    "pages", [Pages(16, [0, 1, 5]), Pages(16, [0, -1, 1]), Pages(16, [0, 1]), Pages(16, [0, 1, 2], 15), Pages(16, [])]
)
def test_a_block_table_that_does_not_fit_is_refused(pages: Pages) -> None:
    layout = make_layout(heads=2, tokens=40)
    block = make_block(Profile.Q4, layout=layout, num_tokens=40)
    keys, values = torch.zeros(2, 5, 2, 16, 8, dtype=torch.bfloat16), torch.zeros(2, 5, 2, 16, 8, dtype=torch.bfloat16)
    with pytest.raises(ShapeError):
        decode_on_device([block.to(keys, values, pages=pages)])
    assert not bool(keys.any())


def test_targets_of_another_shape_are_refused() -> None:
    block = make_block(Profile.Q4)
    keys, values = block.empty(torch.device("cpu"))
    for wrong in (keys[:, :, 1:], keys.float(), keys[:, :2], keys[..., ::2], keys[:1]):
        with pytest.raises(ShapeError):
            decode_on_device([block.to(wrong, values)])
    assert decode_on_device([]) == []
