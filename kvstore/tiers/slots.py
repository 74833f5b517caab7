# SPDX-License-Identifier: Apache-2.0
"""What a caller's slot must look like before native code may touch it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.layout import BlockLayout


def check_slot(slot: Tensor, layout: BlockLayout) -> None:
    """Raise `ShapeError` unless `slot` is [slot_nbytes] uint8, contiguous, in host memory."""
    if (
        slot.dtype != torch.uint8
        or slot.shape != (layout.slot_nbytes,)
        or not slot.is_contiguous()
        or slot.device.type != "cpu"
    ):
        raise ShapeError(
            f"a slot is [{layout.slot_nbytes}] uint8, contiguous, on the CPU; "
            f"got {list(slot.shape)} {slot.dtype} on {slot.device}"
        )


def check_layers(layers: range | None, layout: BlockLayout) -> None:
    """Raise `ShapeError` unless `layers` is None or a run of existing layers, at least one."""
    if layers is None:
        return
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= layout.spec.num_layers:
        raise ShapeError(f"layers {layers}: not a run of layers 0 to {layout.spec.num_layers - 1}")
