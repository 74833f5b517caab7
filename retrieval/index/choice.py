# SPDX-License-Identifier: Apache-2.0
"""Which index holds the rows of a layer: by where they are compared, and how many they become."""

from __future__ import annotations

import torch

from kvstore.retrieval.index.byte_rows import ByteCoding
from kvstore.retrieval.index.float_rows import FloatCoding
from kvstore.retrieval.index.segmented import SegmentedIndex

_DEVICE_SEGMENT_ROWS = 1 << 14
"""A kernel per segment is launched, and takes longer to launch than to read a few rows."""


def choose_index(num_partitions: int, width: int, device: torch.device | None = None) -> SegmentedIndex:
    """Make the index that suits a device; it changes by itself what it does as it grows.

    | rows of a partition | CPU | other devices |
    |---|---|---|
    | up to 1,023 | exact: one product of float32 matrices | the same |
    | more | whole segments as bytes, the rest exact | whole segments of 16,384 as float16, the rest exact |

    On the CPU bytes are read at the speed of memory and lose one or two of a hundred rows; no other coding that was
    measured is both faster and as good at any number of rows (docs/indices.md).

    Args:
        num_partitions: one per KV head.
        width: elements of a row.
        device: where rows are kept and compared; None for the CPU.
    """
    if device is None or device.type == "cpu":
        return SegmentedIndex(num_partitions, width, ByteCoding())
    return SegmentedIndex(num_partitions, width, FloatCoding(torch.float16, device), _DEVICE_SEGMENT_ROWS)
