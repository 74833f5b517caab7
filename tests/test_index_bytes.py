# SPDX-License-Identifier: Apache-2.0
"""Byte rows: the native scorer against the definition, on every level of instructions, and buffers that do not fit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.native import ByteRows, limit_simd, score_byte_rows
from kvstore.retrieval.index.byte_rows import ByteCoding, codes_shape
from kvstore.retrieval.index.coding import Asked
from kvstore.retrieval.index.oracle import best_rows, exact_scores, recall
from kvstore.retrieval.index.segmented import SegmentedIndex


@pytest.fixture(autouse=True)
def restored_level() -> Iterator[None]:
    yield
    limit_simd("avx512")


def drifting_keys(partitions: int, rows: int, width: int, seed: int) -> Tensor:
    """Keys with an offset and a size of their own in every channel, some of them large, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.exp2(2 * torch.randn(partitions, 1, width, generator=generator))
    offset = 3 * torch.randn(partitions, 1, width, generator=generator) * channel
    return torch.randn(partitions, rows, width, generator=generator) * channel + offset


@settings(max_examples=60, deadline=None)
@given(
    partitions=st.integers(1, 3),
    rows=st.integers(1, 70),
    width=st.integers(1, 70) | st.integers(500, 600),
    num_queries=st.integers(1, 3),
    seed=st.integers(0, 1 << 30),
)
def test_all_levels_give_the_same_scores_near_those_of_the_decoded_rows(
    partitions: int, rows: int, width: int, num_queries: int, seed: int
) -> None:
    keys = drifting_keys(partitions, rows, width, seed)
    queries = torch.randn(partitions, num_queries, width, generator=torch.Generator().manual_seed(seed + 1))
    coding = ByteCoding()
    sealed = coding.seal(keys)
    found = []
    for level in ("baseline", "avx2", "avx512"):
        limit_simd(level)
        scores = torch.full((partitions, num_queries, rows + 3), float("nan"))
        coding.score([Asked([sealed], queries, scores)])
        found.append(scores)

    assert all(torch.equal(scores[:, :, :rows], found[0][:, :, :rows]) for scores in found)
    assert all(bool(scores[:, :, rows:].isnan().all()) for scores in found)
    low, step = sealed.parts[1:]
    assert bool(((sealed.decoded() - keys).abs() <= 0.51 * step[:, None] + 1e-5 * keys.abs()).all())
    # Half a unit of a weight for each code of at most 255, and the roundings of float32 sums.
    weights = (queries * step[:, None]).abs()
    sizes = (queries.abs() * (low[:, None].abs() + 255 * step[:, None])).sum(dim=-1, keepdim=True)
    allowed = (
        0.51 * 255 * width * weights.amax(dim=-1, keepdim=True) / (16256 if width <= 516 else 13000) + 1e-5 * sizes
    )
    exact = exact_scores(sealed.decoded(), queries)
    assert bool(((found[0][:, :, :rows] - exact).abs() <= allowed).all())


def test_a_few_weights_far_beyond_the_others_and_none_at_all() -> None:
    keys = drifting_keys(2, 40, 8, seed=0)
    for queries in (torch.zeros(2, 1, 8), torch.full((2, 1, 8), 1e-42), torch.eye(8)[:2].view(2, 1, 8) * 1e6):
        sealed = ByteCoding().seal(keys)
        scores = torch.empty(2, 1, 40)
        ByteCoding().score([Asked([sealed], queries, scores)])
        torch.testing.assert_close(scores, exact_scores(sealed.decoded(), queries), rtol=1e-4, atol=1e-4)


def test_constant_channels_are_kept_exactly() -> None:
    keys = torch.full((1, 20, 4), 1 / 3)
    assert torch.equal(ByteCoding().seal(keys).decoded(), keys)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_share_the_rows_and_change_no_score(num_threads: int) -> None:
    keys, queries = drifting_keys(2, 20_000, 128, seed=0), torch.randn(2, 1, 128)
    index = SegmentedIndex(2, 128)
    index.add(keys)
    before = torch.get_num_threads()
    expected = index.scores(queries)
    try:
        torch.set_num_threads(num_threads)
        assert torch.equal(index.scores(queries), expected)
    finally:
        torch.set_num_threads(before)
    exact = torch.bmm(queries, keys.transpose(1, 2))
    assert recall(expected.topk(32).indices, exact.topk(32).indices) > 0.95


def test_recall_holds_while_keys_drift() -> None:
    drift = torch.linspace(0, 40, 6000)[None, :, None]
    keys, queries = drifting_keys(2, 6000, 32, seed=0), torch.randn(2, 4, 32)
    keys[:, :, :4] += drift
    index = SegmentedIndex(2, 32)
    index.add(keys)
    assert recall(index.search(queries, 32)[1], best_rows(keys, queries, 32)[1]) > 0.95


def test_buffers_that_do_not_fit_are_refused() -> None:
    codes, low = torch.zeros(codes_shape(2, 20, 6), dtype=torch.uint8).numpy().data, torch.zeros(2, 6).numpy().data
    rows = ByteRows(codes, low, low, 2, 20, 6)
    for sizes in ((2, 20, 9), (2, 33, 6), (3, 20, 6), (0, 20, 6), (2, 0, 6), (2, 20, 0), (1 << 40, 1 << 40, 1 << 40)):
        with pytest.raises(ShapeError):
            ByteRows(codes, low, low, *sizes)
    queries, scores = torch.zeros(2, 3, 6).numpy().data, torch.zeros(2, 3, 20).numpy().data
    score_byte_rows([([rows], queries, scores, 3, 20)], 1)
    for job in (
        ([rows], queries, scores, 3, 19),
        ([rows], queries, scores, 2, 20),
        ([rows], queries, scores, 3, 1 << 62),
        ([rows], queries, scores, 1 << 62, 20),
        ([rows, rows], queries, scores, 3, 20),
    ):
        with pytest.raises(ShapeError):
            score_byte_rows([job], 1)
