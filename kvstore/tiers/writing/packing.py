# SPDX-License-Identifier: Apache-2.0
"""Blocks to extents in memory: records with their headers, one behind the other, so that one write takes many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvstore.codec import Codec, Profile
from kvstore.native import pack_extents, seal_extent
from kvstore.spec import BlockKey
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES


@dataclass(frozen=True, slots=True)
class NewRecord:
    """A block to be written.

    Args:
        key: its name.
        slot: [slot_nbytes] uint8 CPU, unchanged until its record has been made.
        num_tokens: tokens in it.
        first_token: position of the first one in its stream.
    """

    key: BlockKey
    slot: Tensor
    num_tokens: int
    first_token: int


@dataclass(frozen=True, slots=True)
class PackedRecord:
    """A record as it lies in an extent.

    Args:
        generation: number of the write, as the header names it.
        nbytes: bytes of the record.
        directory: its first bytes: header and plane directory.
    """

    generation: int
    nbytes: int
    directory: bytes


def pack(
    codec: Codec, profile: Profile, blocks: Sequence[NewRecord], generations: Sequence[int], out: memoryview
) -> list[PackedRecord]:
    """Encode blocks into extents, one behind the other; each takes `extent_nbytes` of its record.

    Args:
        codec: makes the records.
        profile: the codec's.
        blocks: at least one.
        generations: one per block.
        out: writable, with room for the largest extents there can be.

    Raises:
        ShapeError: a block does not fit the codec's layout.
    """
    if profile is Profile.ZSTD:
        return _pack_in_python(codec, blocks, generations, out)
    geometry, dtype, _, number, steps, calibration = codec.writer(1)
    found = pack_extents(
        geometry,
        dtype,
        number,
        steps,
        calibration,
        [
            (block.slot.numpy().data, block.num_tokens, block.first_token, block.key, generation)
            for block, generation in zip(blocks, generations, strict=True)
        ],
        out,
    )
    return [PackedRecord(generation, *each) for generation, each in zip(generations, found, strict=True)]


def _pack_in_python(
    codec: Codec, blocks: Sequence[NewRecord], generations: Sequence[int], out: memoryview
) -> list[PackedRecord]:
    """The zstd step lies outside of native code."""
    packed: list[PackedRecord] = []
    at = 0
    for block, generation in zip(blocks, generations, strict=True):
        record = out[at + EXTENT_HEADER_NBYTES :]
        nbytes = codec.encode(block.slot, block.num_tokens, block.first_token, record)
        directory = bytes(record[: Codec.probe(record[:nbytes]).header_nbytes])
        at += seal_extent(block.key, generation, nbytes, out[at:])
        packed.append(PackedRecord(generation, nbytes, directory))
    return packed
