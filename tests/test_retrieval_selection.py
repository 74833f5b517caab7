# SPDX-License-Identifier: Apache-2.0
"""How a budget turns a ranking into a selection, where the selection is placed, and which policies there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.positions import PositionPolicy, place
from kvstore.retrieval.registry import policies, policy_named
from kvstore.retrieval.selection import Ranking, select
from kvstore.retrieval.triggers.trigger import EveryStep
from tests.tiny_models import policy

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(SIZES, st.data())
def test_selection_keeps_its_promises(sizes: list[int], data: st.DataObject) -> None:
    count = len(sizes)
    order = data.draw(st.permutations(range(count)))
    budget = data.draw(st.integers(0, 200))
    excluded = frozenset(data.draw(st.sets(st.integers(0, count - 1))))
    ranking = Ranking(torch.tensor(order), torch.arange(count, 0, -1).float())
    chosen = select(ranking, torch.tensor(sizes), budget, excluded)
    allowed = [block for block in order if block not in excluded]
    assert chosen == sorted(set(chosen))
    assert not excluded & set(chosen)
    if budget == 0 or not allowed:
        assert chosen == []
        return
    assert allowed[0] in chosen
    assert sum(sizes[block] for block in chosen) <= budget or chosen == [allowed[0]]
    left = budget - sum(sizes[block] for block in chosen)
    assert all(sizes[block] > left for block in allowed if block not in chosen)


def test_an_empty_ranking_selects_nothing() -> None:
    assert select(Ranking(torch.empty(0, dtype=torch.int64), torch.empty(0)), torch.tensor([4]), 10, frozenset()) == []


def test_a_long_ranking_is_searched_to_its_end_for_what_still_fits() -> None:
    sizes = torch.full((5000,), 8)
    sizes[4321] = 3
    ranking = Ranking.of(torch.arange(5000, 0, -1).float())
    assert select(ranking, sizes, 20, frozenset({0})) == [1, 2, 4321]
    pairs = ranking.pairs()
    assert [next(pairs) for _ in range(2)] == [(0, 5000.0), (1, 4999.0)]
    assert len(list(pairs)) == 4998


@st.composite
def pasts(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], int]:
    """Far and near segments of rising positions with gaps, and the stream's end."""
    rows = draw(st.sampled_from([1, 3]))
    position, segments = 0, []
    for size in draw(st.lists(st.integers(1, 6), max_size=8)):
        position += draw(st.integers(0, 50))
        segments.append(torch.arange(position, position + size).expand(rows, size))
        position += size
    cut = draw(st.integers(0, len(segments)))
    return segments[:cut], segments[cut:], position


RULES = (PositionPolicy.ORIGINAL, PositionPolicy.CONSECUTIVE, PositionPolicy.CONSTANT_FAR)


@given(pasts(), st.sampled_from(RULES), st.booleans())
def test_placement_keeps_its_promises(
    past: tuple[list[Tensor], list[Tensor], int], rule: PositionPolicy, on_branch: bool
) -> None:
    far, near, end = past
    rows = (far + near)[0].shape[0] if far + near else 1
    tail_start = 0 if on_branch else end
    placed = place(rule, far, near, rows=rows, stream_end=end, tail_start=tail_start, far_position=99)
    total = sum(segment.shape[1] for segment in far + near)
    first = tail_start + placed.offset
    assert placed.past.shape == (rows, total)
    if rule is PositionPolicy.CONSECUTIVE:
        assert placed.past[0].tolist() == list(range(total))
        assert first == total
        assert placed.num_far == 0
        return
    assert first == end
    if total:
        assert torch.equal(placed.past, torch.cat(far + near, dim=1))
        assert int(placed.past.max()) < first
    is_far = rule is PositionPolicy.CONSTANT_FAR
    assert placed.num_far == (sum(segment.shape[1] for segment in far) if is_far else 0)
    assert placed.far_position == (99 if is_far else 0) or not is_far


def test_closing_up_keeps_the_grid_of_a_picture() -> None:
    picture = torch.tensor([[50, 50, 50, 50], [50, 50, 51, 51], [50, 51, 50, 51]])
    text = torch.arange(10, 13).expand(3, 3)
    placed = place(PositionPolicy.CONSECUTIVE, [text], [picture], rows=3, stream_end=60, tail_start=0, far_position=0)
    assert torch.equal(placed.past[:, 3:], picture - 47)
    assert placed.offset == 5


def test_policies_by_name() -> None:
    assert {"auto", "infllm", "maxsim", "quest", "rekv", "streaming_llm"} <= set(policies())
    assert all(policy_named(name).name == name and policy_named(name).source for name in policies())
    with pytest.raises(ConfigError, match=r"no policy named 'best'.*maxsim"):
        policy_named("best")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("maxsim", {"trigger": EveryStep()}, "needs a pass over the question"),
        ("maxsim", {"retrieves_while_appending": True}, "asks no question"),
        ("quest", {"position": PositionPolicy.CONSECUTIVE}, "attention is not what the score says"),
        ("quest", {"views": ()}, "without views"),
        ("quest", {"estimated_share": 1.0}, "0 to below 1"),
        ("rekv", {"recent_tokens": -1}, "must not be negative"),
        ("rekv", {"estimated_share": 0.2}, "at original positions"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        policy(name, **changes)
