# SPDX-License-Identifier: Apache-2.0
"""Scores of units: those of a view, in both forms, and the best of what may be chosen."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.kernels import dispatch, scoring_reference
from kvstore.kernels.scoring_reference import GROUPS, Agreement, best_of
from kvstore.retrieval.scorers.bound import Bound
from kvstore.retrieval.summarisers.bounds import MinMax
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.view import Group, Pool, View
from tests.layer_tokens import layer_query

HAS_GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled in this process, for the GPU")
Score = Callable[[Tensor, Tensor, Tensor | None, Agreement], Tensor]


def twin(lifted: Tensor, summaries: Tensor, is_eligible: Tensor | None, agreement: Agreement) -> Tensor:
    from kvstore.kernels import scoring_triton

    return scoring_triton.score_units(lifted, summaries, is_eligible, agreement)


each_form = pytest.mark.parametrize(
    "score",
    [
        pytest.param(scoring_reference.score_units, id="reference"),
        pytest.param(twin, id="twin", marks=[needs_triton, interpreted]),
    ],
)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_form
@pytest.mark.parametrize("group", Group)
@pytest.mark.parametrize("is_shared", [False, True], ids=["apart", "together"])
def test_scores_are_those_of_a_view(score: Score, group: Group, is_shared: bool) -> None:
    view = View(MinMax(), Bound(), Space.PLAIN, Pool.EACH, group, is_shared)
    lifted = view.lifted(layer_query(3, kv_heads=2, group=4, dim=8))
    summaries = random(1, 2, 70, 16)
    num_tokens = 1 if group is Group.SUM else 3
    agreement = Agreement(group, num_tokens, 0.3, num_together=2 if is_shared else 1)
    wanted = view.agree(torch.bmm(lifted, summaries.transpose(1, 2)), num_tokens, 0.3)
    torch.testing.assert_close(score(lifted, summaries, None, agreement), wanted, atol=1e-5, rtol=1e-5)


CASES = st.tuples(
    st.sampled_from(GROUPS), st.sampled_from([1, 2]), st.integers(1, 3), st.sampled_from([1, 2, 7, 16]),
    st.integers(1, 3), st.sampled_from([1, 63, 64, 65, 130]), st.sampled_from([32, 65, 128]),
    st.sampled_from([0, 1, 9]), st.integers(0, 99),
)  # fmt: skip


@needs_triton
@interpreted
@settings(max_examples=15, deadline=None)
@given(CASES)
def test_the_twin_equals_the_reference(case: tuple[str, int, int, int, int, int, int, int, int]) -> None:
    group, num_together, runs, heads, num_tokens, num_units, width, masks, seed = case
    num_asking = 1 if group == "sum" else heads * num_tokens
    agreement = Agreement(group, num_tokens if num_asking > 1 else 1, width**-0.5, num_together)
    # A table with room behind its units; all may be chosen, or for all alike, or for each.
    lifted = random(seed, runs * num_together, num_asking, width)
    summaries = random(seed + 1, runs * num_together, num_units + 5, width)[:, :num_units]
    is_eligible = random(seed, min(masks, runs), num_units) > 0 if masks else None
    wanted = scoring_reference.score_units(lifted, summaries, is_eligible, agreement)
    torch.testing.assert_close(twin(lifted, summaries, is_eligible, agreement), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("group", GROUPS)
def test_the_twin_equals_the_reference_on_a_gpu(group: str, dtype: torch.dtype) -> None:
    num_asking = 1 if group == "sum" else 21
    lifted, summaries = (random(0, 8, n, 256).to("cuda", dtype) for n in (num_asking, 5000))
    agreement = Agreement(group, 3 if num_asking > 1 else 1, 1 / 16, num_together=4)
    found = twin(lifted, summaries, None, agreement)
    wanted = scoring_reference.score_units(lifted, summaries, None, agreement)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@each_form
def test_units_that_may_not_be_chosen_keep_their_share_and_lose_their_score(score: Score) -> None:
    lifted, summaries = random(2, 2, 3, 8), random(3, 2, 6, 8)
    is_eligible = torch.tensor([[True, False, True, True, False, True]])
    agreement = Agreement("softmax_mean")
    free, found = (score(lifted, summaries, mask, agreement) for mask in (None, is_eligible))
    assert found[:, [1, 4]].isneginf().all()
    torch.testing.assert_close(found[:, is_eligible[0]], free[:, is_eligible[0]])
    torch.testing.assert_close(free.sum(1), torch.ones(2))


@each_form
def test_no_units_have_no_scores(score: Score) -> None:
    assert score(torch.ones(2, 1, 8), torch.ones(2, 0, 8), None, Agreement()).shape == (2, 0)


def test_the_best_come_first_and_what_may_not_be_chosen_last() -> None:
    scores = torch.tensor([[1.0, -math.inf, 3.0], [-math.inf, 0.0, -math.inf]])
    values, units = best_of(scores, 2)
    assert values.tolist() == [[3.0, 1.0], [0.0, -math.inf]]
    assert units[:, 0].tolist() == [2, 1]
    assert best_of(scores, 9)[1].shape == (2, 3)


def test_dispatch_scores_on_the_cpu_by_the_reference() -> None:
    lifted, summaries = random(4, 2, 1, 8), random(5, 2, 9, 8)
    wanted = scoring_reference.score_units(lifted, summaries, None, Agreement())
    assert torch.equal(dispatch.score_units(lifted, summaries, None, Agreement()), wanted)


@pytest.mark.parametrize(
    ("asking", "summaries", "agreement"),
    [
        pytest.param((2, 1, 8), (3, 5, 8), Agreement(), id="other partitions"),
        pytest.param((2, 1, 8), (2, 5, 9), Agreement(), id="another width"),
        pytest.param((2, 2, 8), (2, 5, 8), Agreement(), id="a sum of two vectors"),
        pytest.param((2, 0, 8), (2, 5, 8), Agreement("softmax_max"), id="nobody asks"),
        pytest.param((2, 5, 8), (2, 5, 8), Agreement("softmax_max", num_tokens=2), id="half a head"),
        pytest.param((3, 1, 8), (3, 5, 8), Agreement(num_together=2), id="half a layer"),
    ],
)
@each_form
def test_what_does_not_fit_is_refused(
    score: Score, asking: tuple[int, ...], summaries: tuple[int, ...], agreement: Agreement
) -> None:
    with pytest.raises(ShapeError):
        score(torch.ones(asking), torch.ones(summaries), None, agreement)


@pytest.mark.parametrize("settings", [{"group": "median"}, {"num_tokens": 0}, {"num_together": 0}])
def test_an_agreement_that_is_none_is_refused(settings: dict[str, str | int]) -> None:
    with pytest.raises(ConfigError):
        Agreement(**settings)  # type: ignore[arg-type]
