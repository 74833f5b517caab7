# SPDX-License-Identifier: Apache-2.0
"""Chooses between a kernel's reference and its Triton twin: the only place that asks whether Triton can run."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

from kvstore.kernels import paged_reference, reference, scoring_reference, summary_reference
from kvstore.kernels.paged_reference import Rotation
from kvstore.kernels.parts_reference import Part
from kvstore.kernels.scoring_reference import Agreement


def rotate_gather(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    row_starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    """Gather rows through a block table and rotate the keys; see `kvstore.kernels.reference.rotate_gather`."""
    if _takes_triton(keys):
        from kvstore.kernels import rotate_gather_triton as twin  # imported here: Triton is optional, and slow to load

        twin.rotate_gather(keys, values, slots, row_starts, cos, sin, out_keys, out_values)
    else:
        reference.rotate_gather(keys, values, slots, row_starts, cos, sin, out_keys, out_values)


def best_similarity(question: Tensor, rows: Tensor, row_starts: Tensor) -> Tensor:
    """Best similarity per question token and block; see `kvstore.kernels.reference.best_similarity`."""
    if _takes_triton(rows):
        from kvstore.kernels import maxsim_triton as twin  # imported here: Triton is optional, and slow to load

        return twin.best_similarity(question, rows, row_starts)
    return reference.best_similarity(question, rows, row_starts)


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    *,
    rotation: Rotation | None,
    bias: Tensor | None,
    scale: float,
) -> Part:
    """Attend to rows of a pool where they lie; see `kvstore.kernels.paged_reference.attend_rows`."""
    if _takes_triton(keys):
        from kvstore.kernels import attend_rows_triton as twin  # imported here: Triton is optional, and slow to load

        if max(keys.shape[3], values.shape[3]) <= twin.MAX_DIM:
            return twin.attend_rows(query, keys, values, rows, rotation=rotation, bias=bias, scale=scale)
    return paged_reference.attend_rows(query, keys, values, rows, rotation=rotation, bias=bias, scale=scale)


def score_units(lifted: Tensor, summaries: Tensor, is_eligible: Tensor | None, agreement: Agreement) -> Tensor:
    """Score all units of all partitions; see `kvstore.kernels.scoring_reference.score_units`."""
    if _takes_triton(summaries):
        from kvstore.kernels import scoring_triton as twin  # imported here: Triton is optional, and slow to load

        return twin.score_units(lifted, summaries, is_eligible, agreement)
    return scoring_reference.score_units(lifted, summaries, is_eligible, agreement)


def summarise_rows(keys: Tensor, rows: Tensor, *, rotation: Rotation | None, kind: str) -> Tensor:
    """Summarise units where they lie; see `kvstore.kernels.summary_reference.summarise_rows`."""
    if _takes_triton(keys):
        from kvstore.kernels import summary_triton as twin  # imported here: Triton is optional, and slow to load

        if rows.shape[2] <= twin.MAX_ROWS:
            return twin.summarise_rows(keys, rows, rotation=rotation, kind=kind)
    return summary_reference.summarise_rows(keys, rows, rotation=rotation, kind=kind)


def _takes_triton(operand: Tensor) -> bool:
    return operand.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
