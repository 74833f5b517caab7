# SPDX-License-Identifier: Apache-2.0
"""Summaries of pages that lie in a pool's slots; in plain torch, as the specification of its twin."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.kernels.paged_reference import Rotation, gather_rows, rows_seen

KINDS = ("mean", "min_max", "cuboid_mean")


def summarise_rows(keys: Tensor, rows: Tensor, *, rotation: Rotation | None, kind: str) -> Tensor:
    """Summarise pages, or units of any rows, where they lie; sums in float32.

    Args:
        keys: [num_slots, kv_heads, block_tokens, key_dim], one layer of every slot, elements of a row adjacent.
        rows: [1 or kv_heads, num_units, unit_rows] int32, contiguous, named as in
            `kvstore.kernels.paged_reference.attend_rows`; negative where a unit is shorter than others.
        rotation: how keys are turned on the way, in float32; its angles are contiguous. None for keys as they lie.
        kind: `mean`: the mean key; `min_max`: `[max | min]` of each element; `cuboid_mean`: `[centre + spread |
            centre - spread]` with the middle of the box and the mean distance from it.

    Returns:
        [kv_heads, num_units, width] float32; width is key_dim for `mean`, else 2 * key_dim. 0 for a unit of no rows.

    Raises:
        ConfigError: no such kind.

    Source: Quest (arXiv:2406.10774) for the box, ArkVale (NeurIPS 2024) for the cuboid.
    """
    check_kind(kind)
    seen = rows_seen(keys, rows, rotation, None)
    met = gather_rows(keys, rows, seen, rotation).float()
    seen = seen[..., None]
    count = seen.sum(dim=2).clamp_min(1)
    if kind == "mean":
        return met.sum(dim=2) / count
    if rows.shape[2] == 0:
        return met.new_zeros(*met.shape[:2], 2 * met.shape[3])
    highest = met.masked_fill(~seen, float("-inf")).amax(dim=2)
    lowest = met.masked_fill(~seen, float("inf")).amin(dim=2)
    if kind == "cuboid_mean":
        centre = (highest + lowest) / 2
        spread = (met - centre[:, :, None]).abs().masked_fill(~seen, 0).sum(dim=2) / count
        highest, lowest = centre + spread, centre - spread
    return torch.cat([highest, lowest], dim=2).masked_fill(~seen.any(dim=2), 0)


def check_kind(kind: str) -> None:
    """Refuse kinds that are none.

    Raises:
        ConfigError: it is one.
    """
    if kind not in KINDS:
        raise ConfigError(f"no such kind of summary: {kind!r}; it is one of {', '.join(KINDS)}")
