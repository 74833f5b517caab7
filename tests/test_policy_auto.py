# SPDX-License-Identifier: Apache-2.0
"""The policy `auto` against its rule, written out; and the parts that only it has."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kvstore.retrieval.fusion import StandardScores
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.summarisers.attended import Attended
from kvstore.retrieval.units import Units
from tests.layer_tokens import layer_query, layer_tokens, rotate

PAGE = 16


def attended_key(keys: Tensor, received: Tensor) -> Tensor:
    """The mean of a page's keys, each as often as it was looked at."""
    total = sum(float(each) for each in received)
    return sum((float(each) / total * key for key, each in zip(keys, received, strict=True)), torch.zeros(16))


def deviations(scores: list[float]) -> list[float]:
    mean = sum(scores) / len(scores)
    spread = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    return [(score - mean) / spread for score in scores]


def test_auto_reads_the_pages_whose_attended_keys_fit_where_they_stand_and_from_afar() -> None:
    tokens, query = layer_tokens(20 * PAGE), layer_query(4)
    memory = LayerMemory(policy_named("auto"), 2, 16)
    memory.add(tokens)
    selection = memory.select(query, budget_tokens=5 * PAGE)

    keys = rotate(tokens.keys[None], tokens.positions[:, None])[0]
    last = query.query[:, :, -1:].flatten(0, 1)[None]
    here = rotate(last, query.positions[:, None, -1:])[0].view(2, 3, 16)
    afar = rotate(last, torch.full((1, 1, 1), query.far_position))[0].view(2, 3, 16)
    rotated: list[list[float]] = [[], []]
    plain = []
    for page in range(20):
        inside = slice(PAGE * page, PAGE * (page + 1))
        for head in range(2):
            key = attended_key(keys[head, inside], tokens.received[head, inside])
            rotated[head].append(sum(float(each @ key) for each in here[head]))
        plain.append(
            sum(
                float(each @ attended_key(tokens.keys[head, inside], tokens.received[head, inside]))
                for head in range(2)
                for each in afar[head]
            )
        )
    for head in range(2):
        scores = [a + 1.25 * b for a, b in zip(deviations(rotated[head]), deviations(plain), strict=True)]
        torch.testing.assert_close(selection.scores[head], torch.tensor(scores), rtol=1e-3, atol=1e-4)
        assert selection.units[head].tolist() == sorted(sorted(range(20), key=lambda page: -scores[page])[:5])


def test_a_page_that_nothing_looked_at_is_the_mean_of_its_keys() -> None:
    tokens = layer_tokens(64)
    unseen = dataclasses.replace(tokens, received=torch.zeros_like(tokens.received))
    found = Attended().summarise(tokens.keys, unseen, Units.runs(0, [16, 40, 8]), slice(0, 2))
    torch.testing.assert_close(found, torch.stack([p.mean(1) for p in tokens.keys.split([16, 40, 8], dim=1)], dim=1))


def test_attended_keys_of_single_tokens_are_those_keys() -> None:
    tokens = layer_tokens(8)
    found = Attended().summarise(tokens.keys, tokens, Units.runs(0, [1] * 8), slice(0, 2))
    torch.testing.assert_close(found, tokens.keys)


def test_standard_scores_heed_neither_offset_nor_scale_of_a_view() -> None:
    first, second = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).split(1)
    fused = StandardScores().fuse([first, second])
    torch.testing.assert_close(StandardScores().fuse([5 + 3 * first, 0.01 * second - 7]), fused, rtol=1e-3, atol=1e-4)
    assert not torch.equal(fused.argsort(), StandardScores(weights=(1.0, 8.0)).fuse([first, second]).argsort())


@pytest.mark.parametrize("num_units", [0, 1, 2])
def test_standard_scores_of_few_or_like_units_are_finite(num_units: int) -> None:
    fused = StandardScores().fuse([torch.ones(2, num_units), torch.ones(1, num_units)])
    assert fused.shape == (2, num_units)
    assert fused.isfinite().all()


def test_units_that_may_not_be_chosen_stay_so_and_leave_the_others_order() -> None:
    scores = torch.tensor([[3.0, float("-inf"), 1.0, 2.0]])
    fused = StandardScores().fuse([scores, torch.zeros(1, 4)])
    assert fused[0].isneginf().tolist() == [False, True, False, False]
    assert fused[0].argsort(descending=True).tolist() == [0, 3, 2, 1]
