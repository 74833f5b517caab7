# SPDX-License-Identifier: Apache-2.0
"""Memory for what stays: pages of its own, outside the heap."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kvstore.native import Arena


def lasting(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of zeros on the CPU, in pages that are resident only once they are written.

    Rows stay, and what they were made of goes. In the heap rows would settle in the gaps that short-lived tensors
    leave, which then fit no such tensor again: it grew six times as fast as the rows.
    """
    nbytes = prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(Arena(nbytes, False), dtype=torch.uint8)[:nbytes].view(dtype).view(shape)


def lasting_copy(tensor: Tensor) -> Tensor:
    """A CPU tensor in such pages."""
    return lasting(tuple(tensor.shape), tensor.dtype).copy_(tensor)
