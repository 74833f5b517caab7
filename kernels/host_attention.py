# SPDX-License-Identifier: Apache-2.0
"""Attention on the CPU to blocks that lie in host memory: only queries and partial results cross to the device."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.kernels.paged_reference import Rotation, attend_rows
from kvstore.kernels.parts_reference import Part, merge_parts

_CHUNK_NBYTES = 4 << 20  # of keys and values in float32: less is many small calls, more falls out of the caches


def attend_on_host(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    *,
    rotation: Rotation | None,
    bias: Tensor | None,
    scale: float,
) -> Part:
    """Attend to rows in host memory on the CPU; see `kvstore.kernels.paged_reference.attend_rows`.

    Rows are met a chunk at a time, so memory does not grow with them.

    Args:
        query: as there, on any device.
        keys: as there, in host memory: one layer of the slots of an arena.
        values: likewise.
        rows: likewise.
        rotation: likewise.
        bias: likewise.
        scale: as there.

    Returns:
        As there, on the device of `query`: ready to be merged with what was attended to on it.

    Raises:
        ShapeError: keys are not in host memory.

    Source: InstInfer (arXiv:2409.04992), which attends inside the drive that holds the KV; here, in host memory.
    """
    if keys.device.type != "cpu":
        raise ShapeError(f"keys lie on {keys.device}; attend to them there, or pass keys in host memory")
    asking = query.to(keys.device)
    row_nbytes = 4 * keys.shape[1] * (keys.shape[3] + values.shape[3])
    chunk = max(_CHUNK_NBYTES // row_nbytes, 1)
    parts = []
    for start in range(0, max(rows.shape[1], 1), chunk):
        part = slice(start, start + chunk)
        turned = replace(rotation, angles=rotation.angles[:, part]) if rotation is not None else None
        added = bias[:, part] if bias is not None else None
        parts.append(attend_rows(asking, keys, values, rows[:, part], rotation=turned, bias=added, scale=scale))
    out, sums = merge_parts(parts)
    return out.to(query.device), sums.to(query.device)
