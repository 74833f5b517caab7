# SPDX-License-Identifier: Apache-2.0
"""Profile `pca`: groups of layers in a calibrated basis, read in parts, and what is done where that does not help."""

from __future__ import annotations

import struct
from contextlib import suppress
from itertools import combinations

import pytest
import torch
from torch import Tensor

from kvstore.bases import FINEST_MULTS, group_layers
from kvstore.calibration import Calibration
from kvstore.codec import Codec, Coding, Profile, plane_span
from kvstore.errors import ConfigError, CorruptRecordError, SpecMismatchError
from kvstore.layout import BlockLayout
from kvstore.native import crc32c
from kvstore.record import STEPS, Steps
from kvstore.spec import ModelSpec
from kvstore.tiers.device.decode import DeviceRecord, decode_on_device
from tests.codec_slots import LATER, encoded, fitted, guarded_slot, seal

LAYERS, HEADS, KEY_DIM, VALUE_DIM, TOKENS = 5, 4, 64, 80, 48
"""At most 1024 channels a group: three layers, then two."""
LAYOUT = BlockLayout(ModelSpec(LAYERS, HEADS, KEY_DIM, VALUE_DIM, "bfloat16", "pre", "llama", "{}", "0"), TOKENS)


def make_text(seed: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all layers that follow from a few numbers a token."""
    fixed, chance = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 16, generator=chance)
    sides = []
    for dim in (KEY_DIM, VALUE_DIM):
        mixed = hidden @ torch.randn(16, LAYERS * HEADS * dim, generator=fixed)
        rows = (mixed + 0.3 * torch.randn(mixed.shape, generator=chance)).view(num_tokens, LAYERS, HEADS, dim)
        sides.append(rows.permute(1, 2, 0, 3))
    return sides[0] + 3, sides[1] * torch.exp2(torch.randn(num_tokens, 1, generator=chance))


def slot_of(keys: Tensor, values: Tensor) -> Tensor:
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    LAYOUT.keys(slot).copy_(keys)
    LAYOUT.values(slot).copy_(values)
    return slot


CALIBRATION = fitted([make_text(1, 4096)], with_bases=True)
CODEC = Codec(LAYOUT, Profile.PCA, CALIBRATION)
SLOT = slot_of(*make_text(2, TOKENS))
RECORD = encoded(CODEC, SLOT, TOKENS)


def decoded(record: bytes | bytearray, codec: Codec = CODEC, layers: range | None = None) -> Tensor:
    slot = guarded_slot(LAYOUT)
    codec.decode(record, slot, num_tokens=TOKENS, layers=layers)
    return slot


def error_of(slot: Tensor, view: str) -> Tensor:
    """[layers, tokens] mean square error relative to the text's."""
    found, wanted = (getattr(LAYOUT, view)(each).float() for each in (slot, SLOT))
    error: Tensor = (found - wanted).square().mean((1, 3)) / wanted.var((1, 3))
    return error


def exact_tokens(record: bytes, plane: int) -> list[int]:
    at = Codec.probe(record).planes[plane].offset
    (count,) = struct.unpack_from("<H", record, at)
    return list(struct.unpack_from(f"<{count}H", record, at + 4))


def test_layers_that_vary_together_take_less_room_and_come_back_better() -> None:
    alone = encoded(Codec(LAYOUT, Profile.Q2, CALIBRATION), SLOT, TOKENS)
    assert len(RECORD) < 0.5 * len(alone)
    for view in ("keys", "values"):
        together = error_of(decoded(RECORD), view)
        assert together.mean() < error_of(decoded(alone, Codec(LAYOUT, Profile.Q2, CALIBRATION)), view).mean()
    planes = Codec.probe(RECORD).planes
    assert {plane.coding for plane in planes} == {Coding.BASIS}
    assert [plane.is_follower for plane in planes[::2]] == [False, True, True, False, True]


def test_the_first_tokens_of_a_stream_are_exact_and_those_of_later_blocks_are_not() -> None:
    assert exact_tokens(RECORD, 0) == exact_tokens(RECORD, 1) == [0, 1, 2, 3]
    assert not error_of(decoded(RECORD), "keys")[:, :4].any()
    later = encoded(CODEC, SLOT, TOKENS, LATER)
    assert exact_tokens(later, 0) == []
    assert bool((error_of(decoded(later), "keys") > 0).all())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_tokens_that_are_not_finite_or_not_like_the_calibrations_are_exact(bad: float) -> None:
    keys, values = make_text(2, TOKENS)
    keys[1, 2, 20, 3] = bad
    values[4, 0, 7, 70] = bad
    keys[:, :, 30] = 30 * torch.randn(keys[:, :, 30].shape, generator=torch.Generator().manual_seed(5))
    slot = slot_of(keys, values)
    record = encoded(CODEC, slot, TOKENS, LATER)
    found = decoded(record)
    assert [exact_tokens(record, plane) for plane in (0, 1, 6, 7)] == [[20, 30], [], [30], [7]]
    assert torch.equal(LAYOUT.keys(found)[:, :, 30], LAYOUT.keys(slot)[:, :, 30])
    wanted = LAYOUT.values(slot)[3:, :, 7].view(torch.int16)
    assert torch.equal(LAYOUT.values(found)[3:, :, 7].view(torch.int16), wanted)


@pytest.mark.parametrize("layers", [range(1), range(1, 3), range(2, 4), range(3, 5), range(4, 5), range(5)], ids=str)
def test_a_layer_range_needs_only_the_bytes_of_its_groups(layers: range) -> None:
    info = Codec.probe(RECORD)
    offset, nbytes = plane_span(info, layers)
    holder = 0 if layers.start < 3 else 3
    assert offset == info.planes[2 * holder].offset
    slot, whole = guarded_slot(LAYOUT), decoded(RECORD)

    CODEC.decode_planes(info, RECORD[offset : offset + nbytes], offset, slot, layers=layers)

    wanted = guarded_slot(LAYOUT)
    for view in (LAYOUT.keys, LAYOUT.values):
        view(wanted)[layers.start : layers.stop] = view(whole)[layers.start : layers.stop]
    assert torch.equal(slot, wanted)


@pytest.mark.parametrize("num_tokens", [6, 9])
def test_layers_of_a_group_that_shrinks_only_as_a_whole_are_read_alone(num_tokens: int) -> None:
    record = encoded(CODEC, SLOT, num_tokens)
    info = Codec.probe(record)
    assert info.planes[0].coding is Coding.BASIS
    assert info.planes[0].nbytes > info.planes[0].raw_nbytes
    whole = guarded_slot(LAYOUT)
    CODEC.decode(record, whole, num_tokens=num_tokens)
    for first, end in combinations(range(LAYERS + 1), 2):
        found, wanted = guarded_slot(LAYOUT), guarded_slot(LAYOUT)
        CODEC.decode(record, found, num_tokens=num_tokens, layers=range(first, end))
        for view in (LAYOUT.keys, LAYOUT.values):
            view(wanted)[first:end] = view(whole)[first:end]
        assert torch.equal(found, wanted)


def test_damage_in_another_group_is_not_looked_at_and_in_its_own_is_named() -> None:
    record = bytearray(RECORD)
    record[Codec.probe(RECORD).planes[1].offset + 200] ^= 1
    decoded(record, layers=range(3, 5))
    with pytest.raises(CorruptRecordError, match="V of layer 0"):
        decoded(record, layers=range(2, 3))


def test_keys_can_be_exact_while_values_are_in_a_basis() -> None:
    codec = Codec(LAYOUT, Profile.PCA, CALIBRATION, exact_keys=True)
    slot = decoded(encoded(codec, SLOT, TOKENS), codec)
    assert not error_of(slot, "keys").any()
    assert bool((error_of(slot, "values")[:, 4:] > 0).all())


def test_a_block_that_the_basis_does_not_fit_is_quantised_plane_by_plane() -> None:
    noise = torch.randn(2, LAYERS, HEADS, TOKENS, VALUE_DIM, generator=torch.Generator().manual_seed(3))
    record = encoded(CODEC, slot_of(noise[0, ..., :KEY_DIM] * 16, noise[1]), TOKENS, LATER)
    assert {plane.coding for plane in Codec.probe(record).planes[::2]} == {Coding.QUANTISED}


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [(None, STEPS[Profile.Q2]), (Steps(-11, -8), STEPS[Profile.Q2]), (Steps(9, 7), Steps(9, 7))],
)
def test_planes_in_no_basis_have_the_steps_of_q2_at_most(steps: Steps | None, wanted: Steps) -> None:
    noise = torch.randn(2, LAYERS, HEADS, TOKENS, VALUE_DIM, generator=torch.Generator().manual_seed(3))
    slot = slot_of(noise[0, ..., :KEY_DIM] * 16, noise[1] * torch.exp2(8 * noise[0, ..., :1]))
    planes = Codec.probe(encoded(Codec(LAYOUT, Profile.PCA, CALIBRATION, steps), slot, TOKENS, LATER)).planes
    assert {plane.coding for plane in planes} == {Coding.QUANTISED}
    assert [plane.mult for plane in planes] == [wanted.key_mult, wanted.value_mult] * LAYERS


@pytest.mark.parametrize("calibration", [None, fitted([make_text(1, 4096)])])
def test_without_bases_it_stores_what_q2_does(calibration: Calibration | None) -> None:
    pca, q2 = (encoded(Codec(LAYOUT, each, calibration), SLOT, TOKENS) for each in (Profile.PCA, Profile.Q2))
    assert pca[64:] == q2[64:]
    assert Codec.probe(pca).profile is Profile.PCA


def test_one_without_bases_or_of_another_text_does_not_read_it() -> None:
    for other in (fitted([make_text(1, 4096)]), fitted([make_text(3, 4096)], with_bases=True), None):
        with pytest.raises(SpecMismatchError, match=CALIBRATION.id.hex()):
            decoded(RECORD, Codec(LAYOUT, Profile.PCA, other))


def test_devices_leave_it_to_the_host() -> None:
    info = Codec.probe(RECORD)
    keys, values = (torch.zeros(1, HEADS, TOKENS, dim, dtype=torch.bfloat16) for dim in (KEY_DIM, VALUE_DIM))
    for layer in (0, 1):
        with pytest.raises(ConfigError, match="host"):
            decode_on_device([DeviceRecord(CODEC, info, RECORD, 0, range(layer, layer + 1), keys, values)])


def test_bases_are_made_for_the_usual_steps() -> None:
    assert STEPS[Profile.PCA] == Steps(*FINEST_MULTS)


def test_groups_are_even_and_as_large_as_the_tokens_bear() -> None:
    assert group_layers(30, 192, 4096) == 5
    assert group_layers(32, 192, 1 << 20) == 5
    assert group_layers(31, 192, 1 << 20) == 5
    assert group_layers(32, 1024, 4096) == 1
    assert group_layers(32, 1024, 4095) == group_layers(32, 1025, 1 << 20) == 0
    assert group_layers(2, 1, 4096) == 2
    assert not fitted([make_text(1, 4 * HEADS * VALUE_DIM - 1)], with_bases=True).has_bases
    assert fitted([make_text(1, 4 * HEADS * VALUE_DIM)], with_bases=True).has_bases


# Of the directory: plane, offset in its entry, struct code, value.
@pytest.mark.parametrize(
    ("plane", "at", "code", "value"),
    [
        (0, 9, "B", 1),
        (0, 11, "B", 1),
        (0, 12, "B", 1),
        (0, 13, "B", 1),
        (0, 14, "H", 0),
        (0, 14, "H", 9),
        (0, 14, "H", 65535),
        (2, 10, "b", 1),
        (2, 14, "H", 1),
        (0, 8, "B", 3),
        (2, 8, "B", 3),
        (6, 8, "B", 2),
    ],
)
def test_entries_that_no_group_has_are_refused(plane: int, at: int, code: str, value: int) -> None:
    record = bytearray(RECORD)
    struct.pack_into(f"<{code}", record, 64 + 16 * plane + at, value)
    with pytest.raises(CorruptRecordError):
        decoded(seal(record))


def test_followers_of_none_and_beyond_their_group_are_refused() -> None:
    entries = Codec.probe(RECORD).planes
    first = bytearray(RECORD)
    first[64:80] = first[96:112]  # K of layer 0 becomes a follower
    size = entries[1].offset - entries[0].offset
    del first[entries[0].offset : entries[1].offset]
    struct.pack_into("<Q", first, 16, len(RECORD) - size)
    beyond = bytearray(RECORD)
    beyond[64 + 16 * 6 : 80 + 16 * 6] = beyond[96:112]  # K of layer 3
    size = entries[7].offset - entries[6].offset
    del beyond[entries[6].offset : entries[7].offset]
    struct.pack_into("<Q", beyond, 16, len(RECORD) - size)
    with pytest.raises(CorruptRecordError, match="K of layer 0 has no bytes"):
        decoded(seal(first))
    with pytest.raises(CorruptRecordError, match="K of layer 4 has no bytes"):
        decoded(seal(beyond))
    decoded(seal(beyond), layers=range(3))


def test_forged_bytes_with_right_checksums_are_read_or_refused() -> None:
    info = Codec.probe(RECORD)
    chance = torch.Generator().manual_seed(4)
    for at in torch.randint(info.header_nbytes, len(RECORD), (60,), generator=chance).tolist():
        forged = bytearray(RECORD)
        forged[at] ^= 0x55
        with suppress(CorruptRecordError):
            decoded(seal(forged))


# Behind the planes: group_layers, reserved, then the first basis' rank and reserved; at the end components.
@pytest.mark.parametrize(
    ("at", "value"), [(0, 0), (0, 6), (0, 2), (2, 1), (4, 65535), (4, 1), (6, 1), (-2, 0x4000), (-2, 0x7FC0)]
)
def test_forged_bases_are_refused(at: int, value: int) -> None:
    data = bytearray(CALIBRATION.data)
    planes = sum(HEADS * (2 + 6 * dim) for dim in (KEY_DIM, VALUE_DIM)) * LAYERS
    struct.pack_into("<H", data, 32 + planes + at if at >= 0 else len(data) + at, value)
    struct.pack_into("<I", data, 8, 0)
    struct.pack_into("<I", data, 8, crc32c(data))
    with pytest.raises(CorruptRecordError):
        Calibration(bytes(data))
