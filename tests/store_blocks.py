# SPDX-License-Identifier: Apache-2.0
"""A small model's blocks, the same in every process: what the tests of the store write and expect to read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey, ModelSpec, chain_key
from kvstore.store import Access, Durability, Entry, FetchRequest, NewBlock, Profile, Store, StreamHeader

SPEC = ModelSpec(
    num_layers=3,
    kv_heads=2,
    key_dim=32,
    value_dim=16,
    dtype="bfloat16",
    key_space="pre",
    architecture="test",
    rope="{}",
    revision="0",
)
LAYOUT = BlockLayout(SPEC, block_tokens=40)
HEADER = StreamHeader("lecture", SPEC, 40, Profile.LOSSLESS, "window=64", {"fps": 25.0}, 1.0)
EXTENT_NBYTES = 24576
"""Random bytes do not shrink: every block of 40 tokens takes an extent of this size."""


def open_store(
    path: Path,
    access: Access = Access.WRITE,
    *,
    host_slots: int = 4,
    disk_nbytes: int | None = None,
    durability: Durability = Durability.COMMIT,
) -> Store:
    """Open a store for blocks of `LAYOUT`."""
    return Store.open(
        path,
        access=access,
        layout=LAYOUT,
        host_nbytes=host_slots * LAYOUT.slot_nbytes,
        disk_nbytes=disk_nbytes,
        durability=durability,
    )


def block_key(number: int) -> BlockKey:
    """Key of block `number`."""
    return chain_key(None, number.to_bytes(4, "little"), "test")


def make_slot(number: int) -> Tensor:
    """Random bytes, always the same for one number."""
    data = hashlib.shake_256(number.to_bytes(8, "little")).digest(LAYOUT.slot_nbytes)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def empty_slot() -> Tensor:
    """A destination."""
    return torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)


def make_blocks(count: int, first: int = 0, num_tokens: int = 40) -> list[NewBlock]:
    """Blocks `first` to `first + count` of a stream that begins with block 0."""
    return [
        NewBlock(
            Entry(index, block_key(index), num_tokens, 40 * index, float(index), index + 1.0, index // 2),
            make_slot(index),
            f"summary {index}".encode(),
        )
        for index in range(first, first + count)
    ]


def renumbered(block: NewBlock, index: int) -> NewBlock:
    """The same block at another place of a stream."""
    return replace(block, entry=replace(block.entry, index=index))


def requests_for(blocks: Iterable[NewBlock], layers: range | None = None) -> list[FetchRequest]:
    """Requests with fresh destinations."""
    return [FetchRequest(block.entry.key, empty_slot(), layers) for block in blocks]


def same_block(left: Tensor, right: Tensor, num_tokens: int = 40) -> bool:
    """Compare two slots' tokens as integers: random bytes hold NaN, which equals nothing."""
    return all(
        torch.equal(part(left)[:, :, :num_tokens].view(torch.int16), part(right)[:, :, :num_tokens].view(torch.int16))
        for part in (LAYOUT.keys, LAYOUT.values)
    )
