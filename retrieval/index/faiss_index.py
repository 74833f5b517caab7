# SPDX-License-Identifier: Apache-2.0
"""The FAISS index: exact inner products over 8-bit rows."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvstore.extras import faiss_distribution, missing_dependency
from kvstore.retrieval.index.flat import FlatIndex, check_rows


@functools.cache
def is_faiss_installed() -> bool:
    """Say whether FAISS is installed, without importing it; asked of the package metadata once.

    Raises:
        ConfigError: two FAISS distributions are installed; they overwrite each other's files.
    """
    return faiss_distribution() is not None


_TRAINING_ROWS = 1024


class FaissIndex:
    """Inner-product search over 8-bit codes.

    The first `_TRAINING_ROWS` rows are searched exactly; when they are there, the range of the codes is learnt from
    them: a range learnt from the first few rows of a growing stream would cut off all that follows. From then on a row
    takes `dim` bytes; on unit vectors the error of a score is below 0.02. Threads: one at a time.

    Args:
        dim: elements of a row.
        num_rows: how many will be added soon; memory for them is taken at once, where growing would take it twice.

    Raises:
        MissingDependencyError: FAISS is not installed.
        ConfigError: two FAISS distributions are installed.
    """

    def __init__(self, dim: int, num_rows: int = 0) -> None:
        if not is_faiss_installed():
            raise missing_dependency("faiss", "the FAISS index")
        import faiss  # imported here: loading it costs 100 ms and a second OpenMP runtime

        self._dim = dim
        self._index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        self._index.codes.resize(num_rows * dim)
        self._index.codes.resize(0)
        self._first: FlatIndex | None = FlatIndex(dim)

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return int(self._index.ntotal) if self._first is None else self._first.num_rows

    def add(self, rows: Tensor) -> None:
        """Append `[num_rows, dim]` float32 rows.

        Raises:
            ShapeError: wrong shape or dtype.
        """
        check_rows(rows, self._dim)
        if self._first is not None:
            # These exactly, whatever they come with: scores depend on the rows alone.
            wanted = _TRAINING_ROWS - self._first.num_rows
            self._first.add(rows[:wanted])
            if self._first.num_rows < _TRAINING_ROWS:
                return
            first, self._first = self._first.rows().float().numpy(), None
            self._index.train(first)
            self._index.add(first)
            rows = rows[wanted:]
        self._index.add(rows.contiguous().numpy())

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SummaryIndex.search`."""
        if self._first is not None:
            return self._first.search(queries, k)
        check_rows(queries, self._dim)
        k = min(k, self.num_rows)
        scores, rows = self._index.search(queries.contiguous().numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(rows)
