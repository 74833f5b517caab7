# SPDX-License-Identifier: Apache-2.0
"""Indices: FAISS against the exact one, growing streams, and rankings by late interaction and mean query."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.extras import faiss_distribution
from kvstore.retrieval.index.faiss_index import FaissIndex
from kvstore.retrieval.index.flat import FlatIndex, SummaryIndex
from kvstore.retrieval.maxsim import LateInteraction, MaxSimScorer
from kvstore.retrieval.selection import Ranking

HITS = LateInteraction().hits_per_token
DIM = 48
needs_faiss = pytest.mark.skipif(faiss_distribution() is None, reason="FAISS is not installed")
KINDS = [FlatIndex, pytest.param(FaissIndex, marks=needs_faiss)]
Make = Callable[[int], SummaryIndex]


def unit(count: int, seed: int = 0, dim: int = DIM) -> Tensor:
    """Random unit vectors."""
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("make", KINDS)
def test_empty_and_small_indices(make: Make) -> None:
    index = make(DIM)
    scores, rows = index.search(unit(3), 5)
    assert scores.shape == rows.shape == (3, 0)
    index.add(unit(2, seed=1))
    scores, rows = index.search(unit(3), 5)
    assert scores.shape == rows.shape == (3, 2)
    assert index.num_rows == 2
    assert torch.equal(rows.sort(dim=1).values, torch.tensor([[0, 1]] * 3))


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("bad", [torch.zeros(2, DIM + 1), torch.zeros(DIM), torch.zeros(2, DIM, dtype=torch.float16)])
def test_misfits_are_refused(make: Make, bad: Tensor) -> None:
    index = make(DIM)
    with pytest.raises(ShapeError):
        index.add(bad)
    with pytest.raises(ShapeError):
        index.search(bad, 1)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("sizes", [(3000,), (1,) * 40 + (2000, 960), (5, 1018, 1, 1, 1975)], ids=["one", "ones", "cut"])
def test_rows_are_found_however_they_came(make: Make, sizes: tuple[int, ...]) -> None:
    rows = unit(3000, seed=2)
    index = make(DIM)
    for part in rows.split(list(sizes)):
        index.add(part)
    assert index.num_rows == 3000
    queries = torch.cat([unit(20, seed=3), rows[::300]])
    exact = queries @ rows.T
    scores, found = index.search(queries, 16)
    assert torch.all(scores[:, :-1] >= scores[:, 1:])
    assert (scores - exact.gather(1, found)).abs().max() < 0.02
    assert (scores - exact.topk(16, dim=1).values).abs().max() < 0.02
    assert torch.equal(found[20:, 0], torch.arange(0, 3000, 300))


@needs_faiss
@pytest.mark.parametrize("batch_rows", [100, 1024, 1025, 3000])
def test_faiss_scores_do_not_depend_on_the_batches_in_which_rows_came(batch_rows: int) -> None:
    rows, (one_by_one, batched) = unit(3000), (FaissIndex(DIM), FaissIndex(DIM))
    for row in rows.split(1):
        one_by_one.add(row)
    for batch in rows.split(batch_rows):
        batched.add(batch)
    for had, wanted in zip(
        batched.search(unit(5, seed=1), 3000), one_by_one.search(unit(5, seed=1), 3000), strict=True
    ):
        assert torch.equal(had, wanted)


@needs_faiss
def test_a_range_is_not_learnt_from_the_first_row() -> None:
    """A live stream adds one block at a time; what comes later may lie far outside the first."""
    rows = unit(1500, seed=4)
    rows[:3] *= 1e-3
    grown, flat = FaissIndex(DIM), FlatIndex(DIM)
    for part in rows.split(1):
        grown.add(part)
    flat.add(rows)
    query = unit(8, seed=5)
    assert (grown.search(query, 10)[0] - flat.search(query, 10)[0]).abs().max() < 0.02


def test_scored_layers_are_ascending_and_fit() -> None:
    rule = LateInteraction()
    assert rule.layers(1) == (0,)
    assert rule.layers(30) == (1, 9)
    for num_layers in range(1, 100):
        layers = rule.layers(num_layers)
        assert list(layers) == sorted(set(layers))
        assert layers[-1] < num_layers


def scorer(make: Make = FlatIndex) -> MaxSimScorer:
    """Two parts of 24 elements, mean zero."""
    return MaxSimScorer(make(DIM), torch.zeros(2, 24), HITS)


def tokens(count: int, seed: int) -> Tensor:
    """Token keys `[count, 2, 24]`."""
    return unit(2 * count, seed, 24).view(count, 2, 24)


@pytest.mark.parametrize("make", KINDS)
def test_a_planted_echo_wins(make: Make) -> None:
    ranked = scorer(make)
    question = tokens(4, seed=9999)
    for block in range(200):
        keys = tokens(8, seed=block)
        if block == 77:
            keys[2:6] = 3.0 * question  # length does not count
        ranked.add([(block, keys)])
    ranking = ranked.rank(question, 200)
    assert int(ranking.blocks[0]) == 77
    assert float(ranking.scores[0]) > 2 * float(ranking.scores[1])
    assert sorted(ranking.blocks.tolist()) == list(range(200))


def test_a_word_in_every_block_adds_nothing() -> None:
    common, rare = tokens(1, seed=1000), tokens(1, seed=2000)
    blocks = [torch.cat([common, tokens(3, seed=block)]) for block in range(HITS + 10)]
    blocks[40] = torch.cat([blocks[40], rare])
    ranked = scorer()
    ranked.add(enumerate(blocks))
    alone = ranked.rank(common, len(blocks))
    assert float(alone.scores.abs().max()) < 1e-3
    both = ranked.rank(torch.cat([common, rare]), len(blocks))
    assert int(both.blocks[0]) == 40
    assert torch.allclose(both.scores, ranked.rank(rare, len(blocks)).scores, atol=1e-3)


def test_empty_and_missing_blocks_rank_last_with_zero() -> None:
    ranked = scorer()
    assert ranked.rank(tokens(2, 1), 0).blocks.tolist() == []
    assert ranked.rank(tokens(2, 1), 3).scores.tolist() == [0.0, 0.0, 0.0]
    ranked.add([])
    ranked.add([(1, tokens(6, 5))])
    ranked.add([(2, tokens(6, 6))])
    ranking = ranked.rank(tokens(6, 5)[:2], 4)
    assert int(ranking.blocks[0]) == 1
    assert {float(score) for block, score in zip(ranking.blocks, ranking.scores, strict=True) if block in (0, 3)} == {
        0.0
    }
    assert ranked.rank(tokens(6, 5)[:0], 4).scores.tolist() == [0.0] * 4


def test_equal_scores_keep_the_older_block_first() -> None:
    assert Ranking.of(torch.tensor([0.0, 1.0, 0.0, 1.0])).blocks.tolist() == [1, 3, 0, 2]
