# SPDX-License-Identifier: Apache-2.0
"""Position policies, against examples by hand and against how a model counts from the start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.retrieval.positions import GROUP_GAP, Placement, PositionPolicy, place

MOVED = [policy for policy in PositionPolicy if policy not in (PositionPolicy.ORIGINAL, PositionPolicy.CONSTANT_FAR)]


def run(start: int, end: int, rows: int = 1) -> Tensor:
    """Positions of text tokens."""
    return torch.arange(start, end).expand(rows, -1)


def placed(
    policy: PositionPolicy,
    far: list[Tensor],
    near: list[Tensor],
    stream_end: int,
    *,
    tail_start: int = 0,
) -> Placement:
    """Place, with rows as the segments have them."""
    rows = [*far, *near, run(0, 0)][0].shape[0]
    return place(policy, far, near, rows=rows, stream_end=stream_end, tail_start=tail_start, far_position=9)


def grid(base: int, frames: int, height: int, width: int) -> Tensor:
    """M-RoPE positions of a clip's tokens, as Qwen2-VL counts them: `[3, frames * height * width]`."""
    time, row, column = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([time.flatten(), row.flatten(), column.flatten()]) + base


def counted(parts: list[tuple[int, int, int] | int]) -> list[Tensor]:
    """Count a stream of texts (so many tokens) and clips (frames, height, width) from 0, as the model does."""
    found, start = [], 0
    for part in parts:
        found.append(run(start, start + part, 3) if isinstance(part, int) else grid(start, *part))
        start = int(found[-1].max()) + 1
    return found


# Sinks 0-1, a group of two neighbours 10-12 and 13-14, a lone 40-41; the window 90-92 of a stream of 93.
FAR = [run(0, 2), run(10, 13), run(13, 15), run(40, 42)]
NEAR = [run(90, 93)]


def test_slot_index_counts_places_in_the_cache() -> None:
    placement = placed(PositionPolicy.SLOT_INDEX, [run(0, 2), torch.tensor([[10, 12]])], NEAR, 93, tail_start=93)
    assert placement.past.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert placement.offset + 93 == 7
    flat = placed(PositionPolicy.SLOT_INDEX, [grid(4, 1, 2, 2)], [], 8)
    assert flat.past.tolist() == [[0, 1, 2, 3]] * 3


def test_shrink_closes_what_nothing_attended_stands_at() -> None:
    placement = placed(PositionPolicy.SHRINK, [run(0, 2), torch.tensor([[10, 12, 13]])], NEAR, 93, tail_start=93)
    assert placement.past.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert placement.offset + 93 == 8
    without_window = placed(PositionPolicy.SHRINK, FAR, [], 93)
    assert without_window.past.tolist() == [[*range(9)]]
    assert without_window.offset == 9


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_shrink_counts_as_if_what_is_missing_had_never_come(data: st.DataObject) -> None:
    part = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    stream = data.draw(st.lists(part, min_size=1, max_size=8))
    kept = data.draw(st.lists(st.booleans(), min_size=len(stream), max_size=len(stream)))
    positions = counted(stream)
    past = [each for each, is_kept in zip(positions, kept, strict=True) if is_kept]
    wanted = counted([each for each, is_kept in zip(stream, kept, strict=True) if is_kept])
    stream_end = int(positions[-1].max()) + 1
    placement = place(
        PositionPolicy.SHRINK, past, [], rows=3, stream_end=stream_end, tail_start=stream_end, far_position=0
    )
    assert torch.equal(placement.past, torch.cat([run(0, 0, 3), *wanted], dim=1))
    assert placement.offset + stream_end == (int(wanted[-1].max()) + 1 if wanted else 0)


def test_shrink_leaves_the_grid_of_a_thinned_frame() -> None:
    frame = grid(20, 1, 2, 3)[:, [1, 5]]
    placement = placed(PositionPolicy.SHRINK, [run(0, 1, 3), frame], [], 23)
    assert placement.past.tolist() == [[0, 1, 1], [0, 1, 2], [0, 2, 3]]


def test_groups_keep_their_distances_and_stand_one_gap_apart() -> None:
    placement = placed(PositionPolicy.GROUP, FAR, NEAR, 93)
    # 8 missing positions stay as they are, 25 and 48 become 16.
    assert placement.past.tolist() == [[0, 1, 10, 11, 12, 13, 14, 31, 32, 49, 50, 51]]
    assert placement.offset == 52
    assert placed(PositionPolicy.GROUP, FAR[:1], [], 93).offset == 2 + GROUP_GAP
    assert placed(PositionPolicy.GROUP, [run(50, 52)], [], 52).past.tolist() == [[0, 1]]


def test_parallel_groups_lie_over_each_other_between_prefix_and_window() -> None:
    placement = placed(PositionPolicy.PARALLEL, FAR, NEAR, 93, tail_start=93)
    assert placement.past.tolist() == [[0, 1, 2, 3, 4, 5, 6, 2, 3, 7, 8, 9]]
    assert placement.offset + 93 == 10
    no_prefix = placed(PositionPolicy.PARALLEL, FAR[1:], [], 93)
    assert no_prefix.past.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert no_prefix.offset == 5


@pytest.mark.parametrize("policy", list(PositionPolicy))
def test_with_everything_attended_the_rules_are_one(policy: PositionPolicy) -> None:
    far, near = [run(0, 4), run(4, 9)], [run(9, 12)]
    segments = [] if policy is PositionPolicy.CONSTANT_FAR else far
    placement = placed(policy, segments, near if segments else [*far, *near], 12, tail_start=12)
    assert placement.past.tolist() == [list(range(12))]
    assert placement.offset == 0


@pytest.mark.parametrize("policy", [PositionPolicy.SHRINK, PositionPolicy.GROUP])
def test_grids_that_overlap_those_of_their_neighbours_stay(policy: PositionPolicy) -> None:
    clip = grid(3, 3, 2, 4)  # one block per frame; their rows overlap
    frames = list(clip.split(8, dim=1))
    placement = placed(policy, [run(0, 3, 3), *frames], [], 7, tail_start=7)
    assert torch.equal(placement.past, torch.cat([run(0, 3, 3), clip], dim=1))
    assert placement.offset == 0


@pytest.mark.parametrize("policy", MOVED)
@pytest.mark.parametrize("rows", [1, 3])
def test_an_empty_past_puts_the_new_tokens_at_the_start(policy: PositionPolicy, rows: int) -> None:
    for empty in ([], [run(0, 0, rows)]):
        placement = place(policy, empty, [], rows=rows, stream_end=50, tail_start=50, far_position=9)
        assert placement.past.shape == (rows, 0)
        assert placement.offset == -50
