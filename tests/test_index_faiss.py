# SPDX-License-Identifier: Apache-2.0
"""Partitions searched by FAISS: exact rows, ranges, groups that merge, lists, and readers beside a writer."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.extras import faiss_distribution
from kvstore.retrieval.index.faiss_partitions import FaissPartitions, FaissRows
from kvstore.retrieval.index.oracle import best_rows, recall
from kvstore.retrieval.index.segment import SEGMENT_ROWS

pytestmark = pytest.mark.skipif(faiss_distribution() is None, reason="FAISS is not installed")
WIDTH = 16


def rows_of(count: int, seed: int = 0) -> Tensor:
    """Of few bits, so that sums are exact in any order, and float16 keeps them."""
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed)).mul(16).round().div(16)


@pytest.mark.parametrize("kind", [FaissRows.FLOAT32, FaissRows.FLOAT16])
@pytest.mark.parametrize("count", [0, 1, SEGMENT_ROWS - 1, SEGMENT_ROWS, 3 * SEGMENT_ROWS + 5])
@pytest.mark.parametrize("end", [None, 0, 700, SEGMENT_ROWS, 2 * SEGMENT_ROWS + 100])
def test_search_finds_the_oracles_rows_in_ranges(kind: FaissRows, count: int, end: int | None) -> None:
    rows, queries = rows_of(count), rows_of(3, seed=1)
    index = FaissPartitions(2, WIDTH, kind)
    for part in rows.split(999, dim=1):
        index.add(part)

    scores, found = index.search(queries, 20, end)
    by_number = index.scores(queries, end)

    assert torch.equal(scores, best_rows(rows, queries, 20, end)[0])
    assert torch.equal(by_number.gather(2, found), scores)
    assert index.num_rows == count


def test_bytes_and_lists_find_most_rows() -> None:
    rows, queries = rows_of(4 * SEGMENT_ROWS), rows_of(20, seed=1)
    wanted = best_rows(rows, queries, 32)[1]
    for index, share in (
        (FaissPartitions(2, WIDTH, FaissRows.BYTES), 0.95),
        (FaissPartitions(2, WIDTH, ivf_rows=4 * SEGMENT_ROWS, probed_share=0.5), 0.7),
        (FaissPartitions(2, WIDTH, FaissRows.FLOAT32, ivf_rows=4 * SEGMENT_ROWS, probed_share=1), 0.99),
    ):
        index.add(rows)
        assert recall(index.search(queries, 32)[1], wanted) > share
        assert int(index.search(queries, 32, 100)[1].max()) < 100


def test_readers_see_whole_prefixes_while_rows_are_added() -> None:
    rows, queries = rows_of(6 * SEGMENT_ROWS), rows_of(1, seed=1)
    exact = torch.bmm(queries, rows.transpose(1, 2))
    index = FaissPartitions(2, WIDTH, FaissRows.FLOAT32)
    faults: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            before = index.num_rows
            scores, found = index.search(queries, 10)
            after = index.num_rows
            # The best of the rows seen are the best of some prefix: of that which ends where nothing better is left.
            prefixes = (exact[:, :, :end].topk(min(10, end)).values for end in range(before, after + 1, 64))
            is_right = torch.equal(exact.gather(2, found), scores) if found.numel() else True
            if not is_right or not any(torch.equal(scores, best) for best in prefixes):
                faults.append(before)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for part in rows.split(64, dim=1):
        index.add(part)
    done.set()
    for reader in readers:
        reader.join(timeout=60)

    assert not any(reader.is_alive() for reader in readers)
    assert faults == []


def test_what_does_not_fit_is_refused() -> None:
    index = FaissPartitions(2, WIDTH)
    for wrong in (rows_of(2)[:1], rows_of(2) / 0):
        with pytest.raises(ShapeError):
            index.add(wrong)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="faiss-gpu"):
            FaissPartitions(2, WIDTH, uses_gpu=True)
