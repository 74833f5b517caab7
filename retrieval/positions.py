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
    SLOT_INDEX: past token `j` of those attended is at `j`, in all rows alike, and the new tokens follow (StreamingLLM,
        arXiv:2309.17453). So a distance is one in the cache, whatever a block has lost; an M-RoPE grid is flattened.
    SHRINK: stretches of positions that no past token has are closed, inside of blocks, too, and the new tokens follow.
        A grid stays as it is, and time inside of it; so do neighbours whose grids overlap. It is what the model would
        have counted, had what is missing never come (StreamingVLM, arXiv:2510.09608, for M-RoPE).
    GROUP: as SHRINK, but a stretch is shortened to `GROUP_GAP` positions instead of closed: what belongs together stays
        so, and what does not is seen to be apart, at distances that the model was trained for. The rule is ours.
    PARALLEL: the first group, if it begins the stream, is a prefix; all other groups of `far` begin right behind it,
        over each other; `near` is closed up behind the longest, and the new tokens follow (APE, arXiv:2502.05431). A
        group is a run of segments without a stretch between them.
    """

    ORIGINAL = "original"
    CONSECUTIVE = "consecutive"
    CONSTANT_FAR = "constant_far"
    SLOT_INDEX = "slot_index"
    SHRINK = "shrink"
    GROUP = "group"
    PARALLEL = "parallel"


GROUP_GAP = 16


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
    joined = _concat(segments, rows)
    if policy is PositionPolicy.SLOT_INDEX:
        return Placement(torch.arange(joined.shape[1]).expand(rows, -1), joined.shape[1] - tail_start)
    if policy in (PositionPolicy.SHRINK, PositionPolicy.GROUP):
        longest = GROUP_GAP if policy is PositionPolicy.GROUP else 0
        past, end = _shortened(joined, stream_end, longest)
        return Placement(past, end - tail_start)
    if policy is PositionPolicy.PARALLEL:
        past, end = _overlaid(far, near, rows, stream_end)
        return Placement(past, end - tail_start)
    num_far = sum(segment.shape[1] for segment in far) if policy is PositionPolicy.CONSTANT_FAR else 0
    return Placement(joined, stream_end - tail_start, num_far, far_position)


def _close_up(segments: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    shifted, cursor = [], 0
    for segment in segments:
        if segment.shape[1] == 0:
            continue
        first, last = int(segment.min()), int(segment.max())
        shifted.append(segment - first + cursor)
        cursor += last - first + 1
    return shifted, cursor


def _shortened(positions: Tensor, end: int, longest: int) -> tuple[Tensor, int]:
    """Cut stretches of unused positions to at most `longest`; the one before the first token is closed.

    Args:
        positions: [rows, num_tokens] int64, in time order.
        end: what follows the stream; the stretch before it counts, too.
        longest: what is left of a longer stretch.

    Returns:
        The same tokens' new positions, and the new end.
    """
    if positions.shape[1] == 0:
        return positions, 0
    highest = positions.amax(dim=0).cummax(dim=0).values
    stretch = positions.amin(dim=0) - 1 - highest.roll(1)
    stretch[0] = positions[:, 0].amin() + longest
    surplus = (stretch - longest).clamp_min(0).cumsum(0)
    before_end = max(0, end - 1 - int(highest[-1]) - longest)
    return positions - surplus, end - int(surplus[-1]) - before_end


def _overlaid(far: Sequence[Tensor], near: Sequence[Tensor], rows: int, end: int) -> tuple[Tensor, int]:
    """Lay groups of `far` over each other behind the prefix, and `near` behind them; also the new end."""
    groups: list[list[Tensor]] = []
    highest = -1
    for segment in far:
        if segment.shape[1] == 0:
            continue
        if groups and int(segment.min()) <= highest + 1:
            groups[-1].append(segment)
        else:
            groups.append([segment])
        highest = max(highest, int(segment.max()))
    shifted, start, behind = [], 0, 0
    for number, group in enumerate(groups):
        joined = _concat(group, rows)
        shifted.append(joined - joined.min() + start)
        behind = max(behind, int(shifted[-1].max()) + 1)
        if number == 0 and int(joined.min()) == 0:
            start = behind
    window, window_end = _shortened(_concat(near, rows), end, 0)
    return _concat([*shifted, window + behind], rows), behind + window_end


def _concat(segments: Sequence[Tensor], rows: int) -> Tensor:
    if not segments:
        return torch.empty(rows, 0, dtype=torch.int64)
    return torch.cat(list(segments), dim=1)
