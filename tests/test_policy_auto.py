# SPDX-License-Identifier: Apache-2.0
"""The policy `auto` against its rule, written out; and the fusion that only it has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.retrieval.fusion import StandardScores
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens, rotate

PAGE = 8


def middle_of_box(query: Tensor, page: Tensor) -> float:
    """The logit of the side of the shrunk box that the query likes best, in every channel."""
    centre = (page.amax(0) + page.amin(0)) / 2
    spread = sum(((key - centre).abs() for key in page), torch.zeros(16)) / len(page)
    return float(torch.maximum(query * (centre + spread), query * (centre - spread)).sum())


def deviations(scores: list[float], share: float) -> list[float]:
    """Scores from their mean, with a share of both neighbours', in units of their root mean square."""
    mean = sum(scores) / len(scores)
    apart = [0.0, *(score - mean for score in scores), 0.0]
    spread = [share * apart[i - 1] + apart[i] + share * apart[i + 1] for i in range(1, len(apart) - 1)]
    size = (sum(each**2 for each in spread) / len(spread)) ** 0.5
    return [each / size for each in spread]


def test_auto_reads_the_pages_that_fit_where_they_stand_and_with_their_neighbours_from_afar() -> None:
    tokens, query = layer_tokens(20 * PAGE), layer_query(4)
    memory = LayerMemory(policy_named("auto"), 2, 16)
    memory.add(tokens)
    selection = memory.select(query, budget_tokens=5 * PAGE)

    keys = rotate(tokens.keys[None], tokens.positions[:, None])[0]
    last = query.query[:, :, -1:].flatten(0, 1)[None]
    here = rotate(last, query.positions[:, None, -1:])[0].view(2, 3, 16)
    afar = rotate(last, torch.full((1, 1, 1), query.far_position))[0].view(2, 3, 16)
    pages = [slice(PAGE * page, PAGE * (page + 1)) for page in range(20)]
    # One list of all heads of the layer, for what a page says.
    said = [
        sum(float(each @ tokens.keys[head, page].mean(0)) for head in range(2) for each in afar[head]) for page in pages
    ]
    for head in range(2):
        seen = [sum(middle_of_box(each, keys[head, page]) for each in here[head]) for page in pages]
        scores = [a + 0.75 * b for a, b in zip(deviations(seen, 0.0), deviations(said, 0.5), strict=True)]
        torch.testing.assert_close(selection.scores[head], torch.tensor(scores), rtol=1e-3, atol=1e-4)
        assert selection.units[head].tolist() == sorted(sorted(range(20), key=lambda page: -scores[page])[:5])


def test_standard_scores_heed_neither_offset_nor_scale_of_a_view() -> None:
    first, second = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).split(1)
    fused = StandardScores().fuse([first, second])
    torch.testing.assert_close(StandardScores().fuse([5 + 3 * first, 0.01 * second - 7]), fused, rtol=1e-3, atol=1e-4)
    assert not torch.equal(fused, StandardScores(neighbours=(0.5, 0.0)).fuse([first, second]))
    assert not torch.equal(fused.argsort(), StandardScores(weights=(1.0, 8.0)).fuse([first, second]).argsort())


@pytest.mark.parametrize("num_units", [0, 1, 2])
def test_standard_scores_of_few_or_like_units_are_finite(num_units: int) -> None:
    fused = StandardScores(neighbours=(0.0, 0.5)).fuse([torch.ones(2, num_units), torch.ones(1, num_units)])
    assert fused.shape == (2, num_units)
    assert fused.isfinite().all()


def test_units_that_may_not_be_chosen_stay_so_and_leave_the_others_order() -> None:
    scores = torch.tensor([[3.0, float("-inf"), 1.0, 2.0]])
    fused = StandardScores().fuse([scores, torch.zeros(1, 4)])
    assert fused[0].isneginf().tolist() == [False, True, False, False]
    assert fused[0].argsort(descending=True).tolist() == [0, 3, 2, 1]
