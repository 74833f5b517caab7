# SPDX-License-Identifier: Apache-2.0
"""Batches of which some blocks are bad: each item has its own outcome and reason, and the others come whole."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.codec import Codec, Profile, header_nbytes
from kvstore.errors import ShapeError
from kvstore.layout import BlockLayout
from kvstore.native import Calibration, Geometry, copy_memory, crc32c, decode_extents, seal_extent
from kvstore.record import DTYPES
from kvstore.store import Access, FetchRequest, Outcome, Store
from kvstore.tiers.codec_shelf import ExtentInMemory
from kvstore.tiers.disk import Found
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, ExtentHeader, extent_nbytes, unpack_extent_header
from tests.codec_slots import fitted, normal_slot
from tests.store_blocks import LAYOUT, SPEC, block_key, open_store, same_block

COUNT = 24
TOKENS = 40
GUARD = 7
GEOMETRY = Geometry(SPEC.num_layers, SPEC.kv_heads, SPEC.key_dim, SPEC.value_dim, SPEC.itemsize, TOKENS)
Change = Callable[[ExtentHeader, bytes], tuple[ExtentHeader, bytes]]


def _slot(number: int) -> torch.Tensor:
    return normal_slot(LAYOUT, number)


def _record(layout: BlockLayout, num_tokens: int = TOKENS) -> bytes:
    codec = Codec(layout, Profile.LOSSLESS)
    out = bytearray(codec.bound(num_tokens))
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    return bytes(out[: codec.encode(slot, num_tokens, 0, out)])


def _of_another_calibration(record: bytes) -> bytes:
    header = bytearray(record[: header_nbytes(SPEC.num_layers)])
    header[48:64] = bytes([GUARD]) * 16
    header[8:12] = bytes(4)
    header[8:12] = crc32c(header).to_bytes(4, "little")
    return bytes(header) + record[len(header) :]


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _packed(header: ExtentHeader) -> bytes:
    """An extent header with a sound checksum, whatever it says."""
    fields = (1, header.generation, header.record_nbytes, header.key, header.record_crc32c)
    front = struct.pack("<4sH2xQQ32sI", b"KVXT", *fields)
    return front + struct.pack("<I", crc32c(front))


BAD: dict[str, tuple[Change, str]] = {
    "a plane is damaged": (lambda header, record: (header, _flipped(record, 1000)), "checksum"),
    "the record's header is damaged": (lambda header, record: (header, _flipped(record, 20)), "header|checksum"),
    "another block took its place": (lambda header, record: (replace(header, key=block_key(99)), record), "another"),
    "it was written again": (lambda header, record: (replace(header, generation=1 << 40), record), "another"),
    "a length that no record has": (lambda header, record: (replace(header, record_nbytes=1 << 63), record), "another"),
    "fewer tokens": (lambda header, record: (header, _record(LAYOUT, 39)), "39 tokens; 40"),
    "another geometry": (
        lambda header, record: (header, _record(BlockLayout(replace(SPEC, kv_heads=1), 40))),
        "layout",
    ),
    "another dtype": (
        lambda header, record: (header, _record(BlockLayout(replace(SPEC, dtype="float16"), 40))),
        "float16",
    ),
    "an unknown calibration": (lambda header, record: (header, _of_another_calibration(record)), "07070707"),
    "no record": (lambda header, record: (header, b"x" * len(record)), "not a record"),
}


def _found(store: Store, number: int) -> Found:
    (found,) = store._disk.look_up([block_key(number)], [False])
    assert isinstance(found, Found)
    return found


def _change(path: Path, store: Store, number: int, change: Change) -> None:
    """Write other bytes to the place of a block; as long as before, as far as the catalogue knows."""
    extent = _found(store, number).record.extent
    with (path / "extents" / f"{extent.file_id:08d}.extents").open("r+b") as file:
        file.seek(extent.offset)
        data = file.read(extent.nbytes)
        header, record = change(unpack_extent_header(data), data[EXTENT_HEADER_NBYTES:])
        file.seek(extent.offset)
        file.write((_packed(header) + record)[: extent.nbytes])


def _filled(path: Path, profile: Profile) -> None:
    numbers = range(COUNT)
    with Store.open(path, access=Access.WRITE, layout=LAYOUT, profile=profile, host_nbytes=1 << 20) as store:
        stored = store.put([block_key(n) for n in numbers], [_slot(n) for n in numbers], [TOKENS] * COUNT)
        assert stored == [Outcome.STORED] * COUNT


def _fetched(path: Path, profile: Profile) -> tuple[dict[int, str], list[Outcome], list[torch.Tensor]]:
    slots = [torch.full((LAYOUT.slot_nbytes,), GUARD, dtype=torch.uint8) for _ in range(COUNT)]
    with Store.open(path, access=Access.READ, layout=LAYOUT, profile=profile, host_nbytes=1 << 20) as store:
        report = store.fetch([FetchRequest(block_key(number), slot) for number, slot in enumerate(slots)])
        damaged = [number for number, outcome in enumerate(report.outcomes) if outcome is Outcome.DAMAGED]
        again = store.fetch([FetchRequest(block_key(number), slot) for number, slot in enumerate(slots)])
        assert [again.outcomes[number] for number in damaged] == [Outcome.DAMAGED] * len(damaged), "nothing was kept"
        assert again.outcomes.count(Outcome.HOST) == COUNT - len(damaged)
    return report.reasons, report.outcomes, slots


@pytest.mark.parametrize("profile", [Profile.RAW, Profile.LOSSLESS, Profile.ZSTD])
def test_bad_blocks_of_every_kind_leave_their_neighbours_whole(tmp_path: Path, profile: Profile) -> None:
    _filled(tmp_path, profile)
    places = dict(zip(range(1, COUNT, 2), BAD.values(), strict=False))
    assert len(places) == len(BAD)
    with open_store(tmp_path, Access.READ) as store:
        for number, (change, _) in places.items():
            _change(tmp_path, store, number, change)

    reasons, outcomes, slots = _fetched(tmp_path, profile)

    for number, slot in enumerate(slots):
        if number in places:
            assert outcomes[number] is Outcome.DAMAGED
            assert (slot == GUARD).all(), "its slot is as it was"
        else:
            assert outcomes[number] is Outcome.DISK
            assert same_block(slot, _slot(number))
    assert sorted(reasons) == sorted(places)
    for number, (_, reason) in places.items():
        assert re.search(reason, reasons[number]), reasons[number]


def test_a_bit_exact_store_brings_no_lossy_block(tmp_path: Path) -> None:
    _filled(tmp_path, Profile.Q8)

    reasons, outcomes, slots = _fetched(tmp_path, Profile.LOSSLESS)

    assert outcomes == [Outcome.DAMAGED] * COUNT
    assert all("lossy" in reason for reason in reasons.values())
    assert all((slot == GUARD).all() for slot in slots)


def _extent(codec: Codec, number: int) -> bytes:
    room = bytearray(extent_nbytes(codec.bound(TOKENS)))
    nbytes = codec.encode(_slot(number), TOKENS, 0, memoryview(room)[EXTENT_HEADER_NBYTES:])
    seal_extent(block_key(number), 5, nbytes, room)
    return bytes(room[: EXTENT_HEADER_NBYTES + nbytes])


def _in_memory(extent: bytes, offset: int, number: int, slot: torch.Tensor) -> ExtentInMemory:
    nbytes = len(extent)
    return offset, nbytes, block_key(number), 5, nbytes - EXTENT_HEADER_NBYTES, TOKENS, slot.data_ptr()


@pytest.mark.parametrize("profile", list(Profile))
def test_one_call_decodes_many_extents_of_all_codings_but_zstd(profile: Profile) -> None:
    calibration = fitted([(LAYOUT.keys(_slot(0)), LAYOUT.values(_slot(0)))]) if profile.is_lossy else None
    codec = Codec(LAYOUT, profile, calibration)
    extents = [_extent(codec, number) for number in range(3)]
    slots = [torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8) for _ in extents]
    starts = [sum(map(len, extents[:number])) for number in range(3)]
    wanted = [
        _in_memory(*each, slot) for each, slot in zip(zip(extents, starts, range(3), strict=True), slots, strict=True)
    ]
    coding = (GEOMETRY, DTYPES.index(SPEC.dtype), profile.is_lossy)

    left = decode_extents(*coding, [] if calibration is None else [calibration.native], b"".join(extents), wanted)

    assert left == ([0, 1, 2] if profile is Profile.ZSTD else [])
    for number, slot in enumerate(slots if not left else []):
        expected = torch.zeros_like(slot)
        codec.decode(extents[number][EXTENT_HEADER_NBYTES:], expected, num_tokens=TOKENS)
        assert torch.equal(slot, expected)
    if calibration is not None:
        assert decode_extents(*coding, [], b"".join(extents), wanted) == [0, 1, 2]


def test_ranges_outside_the_memory_are_refused() -> None:
    extent = _extent(Codec(LAYOUT, Profile.RAW), 1)
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    good = _in_memory(extent, 0, 1, slot)
    coding: tuple[Geometry, int, bool, list[Calibration]] = (GEOMETRY, DTYPES.index(SPEC.dtype), False, [])
    bad = [(1, *good[1:]), (0, len(extent) + 1, *good[2:]), ((1 << 64) - 1, *good[1:])]
    bad += [(*good[:2], b"short", *good[3:]), (*good[:6], 0)]
    for each in bad:
        with pytest.raises(ShapeError):
            decode_extents(*coding, extent, [good, each])
    assert not slot.any(), "nothing is decoded of a call that is refused"
    for nbytes in (0, 63, 64, len(extent) - 1):
        assert decode_extents(*coding, extent, [(0, nbytes, *good[2:])]) == [0], "cut off"
    assert not slot.any()
    assert decode_extents(*coding, extent, [good]) == []
    assert same_block(slot, _slot(1))


def test_memory_is_copied_between_addresses_that_are_some() -> None:
    source, target = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    copy_memory([(source.data_ptr(), target.data_ptr() + 8, 16), (source.data_ptr() + 60, target.data_ptr(), 4)])
    assert target[:4].tolist() == [60, 61, 62, 63]
    assert target[8:24].tolist() == list(range(16))
    assert not target[24:].any()
    for bad in [(0, target.data_ptr(), 1), (source.data_ptr(), 0, 1)]:
        with pytest.raises(ShapeError, match="address"):
            copy_memory([bad])
