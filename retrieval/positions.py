# SPDX-License-Identifier: Apache-2.0
"""Position policies: at which RoPE positions the selected past and the new tokens are attended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class PositionPolicy(StrEnum):
    """Where the past is placed.

    ORIGINAL: where each token was seen. Exact, but distances may exceed what the model was trained for.
    CONSECUTIVE: the selected past is closed up, in time order, right before the new tokens (ReKV, arXiv:2503.00540;
        StreamingLLM, arXiv:2309.17453).
    CONSTANT_FAR: sinks and retrieved blocks all at one distance, the recent window at true distances
        (InfLLM, arXiv:2402.04617).
    """

    ORIGINAL = "original"
    CONSECUTIVE = "consecutive"
    CONSTANT_FAR = "constant_far"


@dataclass(frozen=True, slots=True)
class Placement:
    """Positions for one attention context.

    Args:
        past: [rows, num_past] int64: RoPE position of every past token, in attention order; rows is 1, or 3 for M-RoPE.
        offset: added to the new tokens' own positions.
        num_far: the first `num_far` past tokens are attended un-rotated, by queries at `far_position`; 0 for none.
        far_position: the constant query position of the far part.
    """

    past: Tensor
    offset: int
    num_far: int = 0
    far_position: int = 0


def place(
    policy: PositionPolicy,
    far: Sequence[Tensor],
    near: Sequence[Tensor],
    *,
    rows: int,
    stream_end: int,
    tail_start: int,
    far_position: int,
) -> Placement:
    """Place the past segments and the tail that follows them.

    Args:
        policy: the rule.
        far: sinks and retrieved blocks in time order: `[rows, num_tokens]` int64 original positions each.
        near: the recent window in time order, likewise.
        rows: rows of a position: 1, or 3 for M-RoPE.
        stream_end: the original position that the token after the stream's last would have.
        tail_start: the position which the engine gives to the first new token; the stream's end when it appends to the
            stream, 0 when it asks a question on a branch.
        far_position: query position for the far part under CONSTANT_FAR.

    Returns:
        Placement over `far + near`. Under CONSECUTIVE a block keeps its inner distances (and its M-RoPE grid): it is
        shifted as a whole.
    """
    segments = [*far, *near]
    if policy is PositionPolicy.CONSECUTIVE:
        shifted, cursor = _close_up(segments)
        return Placement(_concat(shifted, rows), cursor - tail_start)
    num_far = sum(segment.shape[1] for segment in far) if policy is PositionPolicy.CONSTANT_FAR else 0
    return Placement(_concat(segments, rows), stream_end - tail_start, num_far, far_position)


def _close_up(segments: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    shifted, cursor = [], 0
    for segment in segments:
        if segment.shape[1] == 0:
            continue
        first, last = int(segment.min()), int(segment.max())
        shifted.append(segment - first + cursor)
        cursor += last - first + 1
    return shifted, cursor


def _concat(segments: Sequence[Tensor], rows: int) -> Tensor:
    if not segments:
        return torch.empty(rows, 0, dtype=torch.int64)
    return torch.cat(list(segments), dim=1)
