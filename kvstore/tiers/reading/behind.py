# SPDX-License-Identifier: Apache-2.0
"""Asks the tier behind the disk for blocks that the disk does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.tiers.moving.backing import Backing
from kvstore.tiers.reading.block_reader import Sought

_BATCH_NBYTES = 32 << 20


def read_behind(
    backing: Backing,
    layout: BlockLayout,
    items: dict[int, Sought],
    left_s: Callable[[], float | None],
    deliver: Callable[[int, Tensor], None],
) -> int:
    """Bring what the disk missed, or found damaged; an item that is not found here either keeps its outcome.

    Args:
        backing: the tier behind.
        layout: of the slots.
        items: those of a batch, by their number; the ones with an outcome are asked for.
        left_s: seconds that are left for the batch.
        deliver: called with an item's number and the whole block, when it is here.

    Returns:
        Bytes of the blocks that came.
    """
    missed = [number for number, item in items.items() if item.outcome is not None]
    step = max(1, _BATCH_NBYTES // layout.slot_nbytes)
    num_found = 0
    for first in range(0, len(missed), step):
        numbers: Sequence[int] = missed[first : first + step]
        # Into memory of its own: slots are not claimed for as long as a server may take.
        memory = torch.empty(len(numbers), layout.slot_nbytes, dtype=torch.uint8)
        outcomes = backing.bring([items[number].key for number in numbers], list(memory), left_s())
        for number, block, outcome in zip(numbers, memory, outcomes, strict=True):
            if outcome.is_hit:
                items[number].outcome = None
                deliver(number, block)
                num_found += 1
    return num_found * layout.slot_nbytes
