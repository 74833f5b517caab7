# SPDX-License-Identifier: Apache-2.0
"""The growing index: scores, ranges, removal and threads, of every coding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.retrieval.index.byte_rows import ByteCoding
from kvstore.retrieval.index.choice import choose_index
from kvstore.retrieval.index.coding import Coding
from kvstore.retrieval.index.float_rows import FloatCoding
from kvstore.retrieval.index.oracle import best_rows, exact_scores, recall
from kvstore.retrieval.index.reduced_rows import ReducedCoding
from kvstore.retrieval.index.segmented import SegmentedIndex
from kvstore.retrieval.index.snapshot import best_columns, search_together

PARTITIONS, WIDTH, SEGMENT = 2, 12, 32
CODINGS: dict[str, tuple[Coding, float]] = {
    "float32": (FloatCoding(), 1e-5),
    "float16": (FloatCoding(torch.float16), 2e-3),
    "bfloat16": (FloatCoding(torch.bfloat16), 2e-2),
    "float8": (FloatCoding(torch.float8_e4m3fn), 0.1),
    "bytes": (ByteCoding(), 2e-2),
}


def rows_of(count: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(PARTITIONS, count, width, generator=torch.Generator().manual_seed(seed))


def small(coding: Coding | None = None) -> SegmentedIndex:
    return SegmentedIndex(PARTITIONS, WIDTH, coding, SEGMENT)


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("count", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 5 * SEGMENT + 7])
def test_scores_are_near_the_oracles(name: str, count: int) -> None:
    coding, share = CODINGS[name]
    rows, queries = rows_of(count), rows_of(3, seed=1)
    index = small(coding)
    index.add(rows)

    scores = index.scores(queries)
    exact = exact_scores(rows, queries)

    assert scores.shape == exact.shape == (PARTITIONS, 3, count)
    allowed = share * queries.norm(dim=-1)[:, :, None] * rows.norm(dim=-1)[:, None]
    assert bool(((scores - exact).abs() <= allowed).all())


@pytest.mark.parametrize("name", CODINGS)
def test_scores_do_not_depend_on_how_rows_came(name: str) -> None:
    rows, queries = rows_of(3 * SEGMENT + 5), rows_of(2, seed=1)
    at_once, one_by_one = small(CODINGS[name][0]), small(CODINGS[name][0])
    at_once.add(rows)
    for row in rows.split(1, dim=1):
        one_by_one.add(row)

    assert torch.equal(at_once.scores(queries), one_by_one.scores(queries))


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(0, 70), max_size=6),
    end=st.none() | st.integers(-1, 250),
    k=st.integers(1, 300),
    removed=st.sets(st.integers(0, 200)),
    seed=st.integers(0, 99),
)
def test_search_finds_the_oracles_rows_in_ranges_and_after_removal(
    parts: list[int], end: int | None, k: int, removed: set[int], seed: int
) -> None:
    index = small(FloatCoding())
    # Of few bits, so that sums are exact in any order.
    rows, queries = (rows_of(count, of).mul(16).round().div(16) for count, of in ((sum(parts), seed), (2, seed + 1)))
    half = len(parts) // 2
    for part in rows.split(parts, dim=1)[:half]:
        index.add(part)
    early = sorted(row for row in removed if row < index.num_rows)
    index.remove(torch.tensor(early[::2], dtype=torch.int64))
    index.remove(torch.tensor(early, dtype=torch.int64))
    for part in rows.split(parts, dim=1)[half:]:
        index.add(part)

    scores, found = index.search(queries, k, end)
    exact, expected = best_rows(rows, queries, k, end, early)
    by_number = index.scores(queries, end)

    assert torch.equal(scores, exact)
    assert torch.equal(by_number.gather(2, found), exact)
    assert torch.equal(by_number.gather(2, expected), exact)
    assert by_number.shape[2] == (rows.shape[1] if end is None else min(max(end, 0), rows.shape[1]))
    assert all(len(set(row)) == len(row) for row in found.flatten(0, 1).tolist())
    gone = [row for row in early if row < by_number.shape[2]]
    assert bool(by_number[:, :, gone].isneginf().all())
    assert int(by_number.isneginf().sum()) == PARTITIONS * 2 * len(gone)


def test_a_quarter_of_dead_rows_is_marked_and_one_more_is_left_out() -> None:
    index = SegmentedIndex(PARTITIONS, WIDTH, FloatCoding(), SEGMENT)
    index.add(rows_of(SEGMENT))
    index.remove(torch.arange(SEGMENT // 4))
    assert index.dump()[0].rows.num_rows == SEGMENT
    index.remove(torch.tensor([20]))
    assert index.dump()[0].rows.num_rows == SEGMENT - SEGMENT // 4 - 1
    index.remove(torch.arange(SEGMENT))
    assert index.dump() == []
    assert index.num_rows == SEGMENT


@pytest.mark.parametrize("name", CODINGS)
def test_rows_keep_their_scores_when_others_are_removed(name: str) -> None:
    rows, queries = rows_of(3 * SEGMENT), rows_of(2, seed=1)
    index = small(CODINGS[name][0])
    index.add(rows)
    before = index.scores(queries)
    gone = torch.arange(0, 3 * SEGMENT, 3)
    index.remove(gone)

    after = index.scores(queries)

    left = torch.ones(3 * SEGMENT, dtype=torch.bool)
    left[gone] = False
    torch.testing.assert_close(after[:, :, left], before[:, :, left], atol=1e-5, rtol=1e-5)
    assert bool(after[:, :, ~left].isneginf().all())


@pytest.mark.parametrize("columns", [1, 63, 64, 255, 256, 257, 2000, 2047, 2048])
@pytest.mark.parametrize("k", [0, 1, 7])
def test_the_best_columns_are_those_of_a_full_sort(columns: int, k: int) -> None:
    scores = torch.randint(-50, 50, (2, 3, columns), generator=torch.Generator().manual_seed(columns)).float()
    scores[:, :, ::3] = float("-inf")
    k = min(k, columns)

    values, places = best_columns(scores, k)

    assert torch.equal(values, scores.sort(dim=-1, descending=True).values[..., :k])
    assert torch.equal(scores.gather(-1, places), values)
    assert all(len(set(row)) == k for row in places.flatten(0, 1).tolist())


def test_several_indices_are_searched_at_once() -> None:
    indices = [small(), small(), SegmentedIndex(PARTITIONS, 7, FloatCoding(), SEGMENT)]
    widths = [WIDTH, WIDTH, 7]
    for seed, (index, width) in enumerate(zip(indices, widths, strict=True)):
        index.add(rows_of(40 + 30 * seed, seed, width))
    queries = [rows_of(3, 9, width) for width in widths]

    together = search_together([index.snapshot() for index in indices], queries, 5)

    for index, asked, (scores, rows) in zip(indices, queries, together, strict=True):
        alone = index.search(asked, 5)
        assert torch.equal(scores, alone[0])
        assert torch.equal(rows, alone[1])


def test_reduced_rows_find_what_lies_in_few_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(PARTITIONS, WIDTH, WIDTH, generator=generator)).Q[:, :, :4]
    rows = torch.randn(PARTITIONS, 200, 4, generator=generator) @ basis.transpose(1, 2) + 3
    queries = rows_of(4, seed=1)
    index = SegmentedIndex(PARTITIONS, WIDTH, ReducedCoding.fitted(rows[:, :100], 4, FloatCoding()), SEGMENT)
    index.add(rows)

    torch.testing.assert_close(index.scores(queries), exact_scores(rows, queries), atol=1e-3, rtol=1e-3)
    assert index.dump()[0].rows.parts[0].shape == (PARTITIONS, SEGMENT, 4)


def test_directions_weighed_by_queries_miss_less_of_their_scores() -> None:
    rows, queries = rows_of(400), rows_of(50, seed=1)
    queries[:, :, 4:] *= 0.01

    def error(coding: ReducedCoding) -> float:
        index = SegmentedIndex(PARTITIONS, WIDTH, coding, SEGMENT)
        index.add(rows[:, : 12 * SEGMENT])
        return float((index.scores(queries) - exact_scores(rows[:, : 12 * SEGMENT], queries)).norm())

    plain = ReducedCoding.fitted(rows, 4, FloatCoding())
    weighed = ReducedCoding.fitted(rows, 4, FloatCoding(), queries)

    assert error(weighed) < 0.1 * error(plain)


def test_the_chosen_index_is_exact_while_it_is_small_and_then_a_byte_per_element() -> None:
    rows, queries = rows_of(2000), rows_of(2, seed=1)
    index = choose_index(PARTITIONS, WIDTH)
    index.add(rows[:, :1023])
    assert torch.equal(index.scores(queries), torch.bmm(queries, rows[:, :1023].transpose(1, 2)))
    index.add(rows[:, 1023:])
    assert [part.dtype for part in index.dump()[0].rows.parts] == [torch.uint8, torch.float32, torch.float32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_rows_on_a_gpu_are_found_and_removed_as_on_the_cpu() -> None:
    rows, queries = rows_of(40_000), rows_of(2, seed=1)
    index = choose_index(PARTITIONS, WIDTH, torch.device("cuda"))
    for part in rows.split(7000, dim=1):
        index.add(part)
    index.remove(torch.arange(0, 20_000))
    index.remove(torch.tensor([39_999]))

    scores, found = index.search(queries, 32, 39_000)

    assert found.device.type == "cuda"
    expected = best_rows(rows, queries, 32, 39_000, range(20_000))
    assert recall(found.cpu(), expected[1]) > 0.95
    torch.testing.assert_close(scores.cpu(), expected[0], atol=2e-2, rtol=2e-2)


def test_wrong_rows_are_refused_and_leave_the_index_as_it_was() -> None:
    index = small()
    index.add(rows_of(3))
    for wrong in (rows_of(2, width=5), rows_of(2)[:1], rows_of(2).double(), rows_of(2) / 0):
        with pytest.raises(ShapeError):
            index.add(wrong)
    with pytest.raises(ShapeError):
        index.scores(rows_of(2, width=5))
    with pytest.raises(ShapeError):
        index.remove(torch.tensor([3]))
    assert index.num_rows == 3
