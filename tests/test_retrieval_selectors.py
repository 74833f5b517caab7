# SPDX-License-Identifier: Apache-2.0
"""Selectors: what each chooses by hand or by a literal reference, and what holds for all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.selectors.adaptive import Adaptive
from kvstore.retrieval.selectors.budget import Selector, TokenBudget, most_that_fit
from kvstore.retrieval.selectors.counted import TopShare, TopUnits
from kvstore.retrieval.selectors.ladder import Ladder
from kvstore.retrieval.selectors.mass import CumulativeMass
from kvstore.retrieval.selectors.neighbours import Chunked, Neighbours
from tests.layer_tokens import layer_query, layer_tokens

NONE = -math.inf

# All but those that stop by themselves: with room for everything, they choose everything.
GREEDY: tuple[Selector, ...] = (
    TokenBudget(),
    TopShare(1.0),
    CumulativeMass(1.0, scale=0.3),
    Adaptive(),
    Ladder(4, 2, layer=1),
    Neighbours(2),
    Chunked(3),
    Neighbours(1, Adaptive()),
)
FRUGAL: tuple[Selector, ...] = (TopUnits(3), TopShare(0.4), CumulativeMass(0.7, scale=0.3), Chunked(2, TopUnits(1)))


def chosen(
    selector: Selector, scores: list[list[float]], budget: int, sizes: list[int] | None = None
) -> list[list[int]]:
    """What a selector takes of units of one token each, or of these `sizes`."""
    table = torch.tensor(scores)
    tokens = torch.tensor(sizes or [1] * table.shape[1]).expand_as(table)
    return [row.nonzero()[:, 0].tolist() for row in selector.select(table, tokens, budget)]


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Scores with equals and -inf among them, sizes, and a budget."""
    partitions, units = draw(st.integers(1, 4)), draw(st.integers(0, 24))
    score = st.sampled_from([NONE, -7.0, -0.5, 0.0, 0.25, 1.0, 1.5, 4.0])
    rows = [draw(st.lists(score, min_size=units, max_size=units)) for _ in range(partitions)]
    sizes = draw(st.lists(st.integers(1, 9), min_size=units, max_size=units))
    scores = torch.tensor(rows).view(partitions, units)
    return scores, torch.tensor(sizes, dtype=torch.int64).expand_as(scores), draw(st.integers(0, 60))


@pytest.mark.parametrize("selector", [*GREEDY, *FRUGAL], ids=repr)
@settings(max_examples=30, deadline=None)
@given(given_choice=choices())
def test_no_selector_exceeds_its_budget_or_takes_what_may_not_be_chosen(
    selector: Selector, given_choice: tuple[Tensor, Tensor, int]
) -> None:
    scores, sizes, budget = given_choice
    before = scores.clone()
    taken = selector.select(scores, sizes, budget)
    assert taken.shape == scores.shape
    assert taken.dtype == torch.bool
    assert torch.equal(scores, before)
    assert not (taken & scores.isneginf()).any()
    assert torch.equal(taken, selector.select(scores.clone(), sizes.clone(), budget))
    if budget == 0:
        assert not taken.any()
        return
    assert torch.equal(taken.any(1), (~scores.isneginf()).any(1)), "a partition that may read reads something"
    if isinstance(selector, Adaptive) or getattr(selector, "inner", None) == Adaptive():
        over = (taken * sizes).sum() > budget * scores.shape[0]
        assert not over or (taken.sum(1) <= 1).any()
    elif not isinstance(selector, Chunked):
        assert (((taken * sizes).sum(1) <= budget) | (taken.sum(1) == 1)).all()
    else:
        runs = torch.nn.functional.pad(taken, (0, -taken.shape[1] % selector.num_units)).unflatten(
            1, (-1, selector.num_units)
        )
        assert (((taken * sizes).sum(1) <= budget) | (runs.any(2).sum(1) == 1)).all()


@pytest.mark.parametrize("selector", GREEDY, ids=repr)
@settings(max_examples=20, deadline=None)
@given(given_choice=choices())
def test_with_room_for_everything_everything_is_chosen(
    selector: Selector, given_choice: tuple[Tensor, Tensor, int]
) -> None:
    scores, sizes, _ = given_choice
    budget = max(1, int(sizes[:1].sum()))
    assert torch.equal(selector.select(scores, sizes, budget), ~scores.isneginf())


def test_counted_selectors_stop_at_their_count_and_at_the_budget() -> None:
    scores = [[1.0, 5.0, NONE, 4.0, 3.0, 2.0]]
    assert chosen(TopUnits(2), scores, 100) == [[1, 3]]
    assert chosen(TopUnits(3), scores, 2) == [[1, 3]]
    assert chosen(TopUnits(50), scores, 100) == [[0, 1, 3, 4, 5]]
    assert chosen(TopShare(0.4), scores, 100) == [[1, 3]]
    assert chosen(TopShare(0.41), scores, 100) == [[1, 3, 4]]
    assert chosen(TopShare(0.01), scores, 100) == [[1]]


def test_mass_takes_as_few_units_as_reach_it() -> None:
    shares = [[0.1, 0.5, 0.3, 0.1]]
    assert chosen(CumulativeMass(0.5), shares, 100) == [[1]]
    assert chosen(CumulativeMass(0.51), shares, 100) == [[1, 2]]
    assert chosen(CumulativeMass(0.85), shares, 100) == [[0, 1, 2]]
    assert chosen(CumulativeMass(0.85), shares, 2) == [[1, 2]]
    logits = [[2 * math.log(share) for share in shares[0]], [0.0, NONE, 0.0, 0.0]]
    assert chosen(CumulativeMass(0.75, scale=0.5), logits, 100) == [[1, 2], [0, 2, 3]]


def reference_adaptive(scores: list[list[float]], total: int) -> list[set[int]]:
    """StreamKV's allocation: bisect the share that all layers read up to; units of one token, none excluded."""
    orders, reached = [], []
    for row in scores:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((score - mean) ** 2 for score in row) / (len(row) - 1))
        powers = [math.exp((score - mean) / deviation) for score in row]
        order = sorted(range(len(row)), key=lambda unit: -row[unit])
        sums, so_far = [], 0.0
        for unit in order:
            so_far += powers[unit] / sum(powers)
            sums.append(so_far)
        orders.append(order)
        reached.append(sums)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(max(1, sum(share < middle for share in sums)) for sums in reached) > total:
            high = middle
        else:
            low = middle
    return [
        set(order[: max(1, sum(share < low for share in sums))]) for order, sums in zip(orders, reached, strict=True)
    ]


@pytest.mark.parametrize("budget", [2, 3, 7, 15])
def test_the_adaptive_selector_reads_all_partitions_up_to_one_share(budget: int) -> None:
    chance = torch.Generator().manual_seed(budget)
    scores = torch.randn(6, 30, generator=chance) ** 3 * torch.tensor([[1.0], [10], [0.1], [5], [2], [30]])
    wanted = reference_adaptive(scores.tolist(), 6 * budget)
    found = chosen(Adaptive(), scores.tolist(), budget)
    assert [set(row) for row in found] == wanted
    assert sum(len(row) for row in found) == 6 * budget
    assert len({len(row) for row in found}) > 1


def test_layers_whose_scores_are_known_at_once_share_a_budget() -> None:
    chance = torch.Generator().manual_seed(0)
    peaked, flat = torch.randn(2, 40, generator=chance) ** 5, torch.rand(2, 40, generator=chance)
    layers = torch.cat([peaked, flat]).tolist()
    together = chosen(Adaptive(), layers, 6)
    assert [set(row) for row in together] == reference_adaptive(layers, 4 * 6)
    apart = [*chosen(Adaptive(), layers[:2], 6), *chosen(Adaptive(), layers[2:], 6)]
    assert sum(map(len, together[:2])) < sum(map(len, apart[:2])) == 12


def reference_ladder(count: int, budget: int, width: int, rungs: int, layer: int) -> list[int]:
    """Thin ladder after ladder, oldest first, over and over, until units of one token fit."""
    units, first = list(range(count)), 0
    offset = layer % (width - rungs + 1)
    while len(units) > budget and len(units) >= width:
        if first + width > len(units):
            first = 0
        ladder = units[first : first + width]
        units[first : first + width] = ladder[offset : offset + rungs]
        first += rungs
    return units[-budget:]


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("budget", [1, 3, 8, 15, 26, 39])
def test_a_ladder_thins_the_oldest_first_and_shifts_with_the_layer(layer: int, budget: int) -> None:
    selector = Ladder(5, 2).in_layer(layer)
    wanted = reference_ladder(40, budget, 5, 2, layer)
    assert chosen(selector, [[0.0] * 40] * 2, budget) == [wanted] * 2


def test_layers_of_a_ladder_hold_together_what_each_could_not() -> None:
    layers = [set(chosen(Ladder(4).in_layer(layer), [[0.0] * 32], 8)[0]) for layer in range(4)]
    assert all(len(layer) == 8 for layer in layers)
    assert set.union(*layers) == set(range(32))


def test_a_memory_asks_a_ladder_for_its_layer() -> None:
    policy = replace(policy_named("quest"), selector=Ladder(4))
    for layer in (0, 3, 4):
        memory = LayerMemory(policy, 2, 16, layer=layer)
        memory.add(layer_tokens(16 * 8))
        assert memory.select(layer_query(1), 32).units[0].tolist() == [layer % 4, 4 + layer % 4]


def test_neighbours_come_right_behind_the_unit_that_they_lie_beside() -> None:
    scores = [[0.0, 1.0, 9.0, 2.0, 0.0, 0.0, 8.0, NONE]]
    assert chosen(Neighbours(1), scores, 1) == [[2]]
    assert chosen(Neighbours(1), scores, 3) == [[1, 2, 3]]
    assert chosen(Neighbours(1), scores, 5) == [[1, 2, 3, 5, 6]]
    assert chosen(Neighbours(2), scores, 5) == [[0, 1, 2, 3, 4]]
    assert chosen(Neighbours(1, TopUnits(3)), scores, 100) == [[1, 2, 3]]


def test_runs_are_chosen_whole_by_the_mean_of_what_may_be_chosen() -> None:
    scores = [[0.0, 6.0, 4.0, 4.0, 5.0, NONE, 9.0]]
    assert chosen(Chunked(2), scores, 1) == [[6]]
    assert chosen(Chunked(2), scores, 2) == [[4, 6]]
    assert chosen(Chunked(2), scores, 5) == [[2, 3, 4, 6]]
    assert chosen(Chunked(2, TopUnits(3)), scores, 100) == [[2, 3, 4, 6]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopUnits(0),
        lambda: TopShare(0.0),
        lambda: TopShare(1.1),
        lambda: CumulativeMass(0.0),
        lambda: CumulativeMass(0.5, scale=0.0),
        lambda: Ladder(3, 3),
        lambda: Ladder(3, 0),
        lambda: Neighbours(0),
        lambda: Chunked(0),
    ],
)
def test_what_makes_no_sense_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        make()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 200))
def test_no_more_units_fit_than_the_bound_says(sizes: list[int], budget: int) -> None:
    num_fitting = sum(total <= budget for total in accumulate(sorted(sizes)))
    assert max(1, num_fitting) <= most_that_fit(torch.tensor([sizes]), budget) <= len(sizes)


def test_one_short_page_hardly_moves_the_bound() -> None:
    assert most_that_fit(torch.tensor([[16] * 100 + [1]]), 64) == 5
