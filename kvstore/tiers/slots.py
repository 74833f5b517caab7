# SPDX-License-Identifier: Apache-2.0
"""What a caller's keys and slots must look like before LMDB and native code may touch them; copies of slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.layout import BlockLayout
from kvstore.spec import BLOCK_KEY_NBYTES, BlockKey


def copy_slot(source: Tensor, target: Tensor) -> None:
    """Copy one slot, or a part of it, over another; both may have been made in inference mode or outside it."""
    with torch.inference_mode():  # the mode in which tensors of both kinds can be written
        target.copy_(source)


def check_slots(slots: Iterable[Tensor], layout: BlockLayout) -> None:
    """Raise `ShapeError` unless every slot is [slot_nbytes] uint8, contiguous, in host memory."""
    nbytes = layout.slot_nbytes
    wanted = torch.Size((nbytes,))
    for slot in slots:
        if slot.dtype is not torch.uint8 or slot.shape != wanted or not slot.is_contiguous() or not slot.is_cpu:
            raise ShapeError(
                f"a slot is [{nbytes}] uint8, contiguous, on the CPU; "
                f"got {list(slot.shape)} {slot.dtype} on {slot.device}"
            )


def check_layers(layers: range, layout: BlockLayout) -> None:
    """Raise `ShapeError` unless `layers` is a run of existing layers, at least one."""
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= layout.spec.num_layers:
        raise ShapeError(f"layers {layers}: not a run of layers 0 to {layout.spec.num_layers - 1}")


def check_keys(keys: Iterable[BlockKey]) -> None:
    """Raise `ShapeError` unless every key has the length of a block key."""
    for key in keys:
        if len(key) != BLOCK_KEY_NBYTES:
            raise ShapeError(f"a block key has {BLOCK_KEY_NBYTES} bytes, got {len(key)}")


def check_gets(keys: Sequence[BlockKey], slots: Sequence[Tensor], layout: BlockLayout) -> None:
    """Raise `ShapeError` unless keys and slots are as many and fit the layout."""
    if len(keys) != len(slots):
        raise ShapeError(f"{len(keys)} keys, {len(slots)} slots")
    check_keys(keys)
    check_slots(slots, layout)


def check_blocks(
    keys: Sequence[BlockKey], slots: Sequence[Tensor], num_tokens: Sequence[int], layout: BlockLayout
) -> None:
    """Raise `ShapeError` unless keys, slots and token counts are as many and fit the layout."""
    if not len(keys) == len(slots) == len(num_tokens):
        raise ShapeError(f"{len(keys)} keys, {len(slots)} slots, {len(num_tokens)} token counts")
    check_keys(keys)
    check_slots(slots, layout)
    for tokens in num_tokens:
        if not 1 <= tokens <= layout.block_tokens:
            raise ShapeError(f"a block of {tokens} tokens; a slot takes 1 to {layout.block_tokens}")
