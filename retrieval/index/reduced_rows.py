# SPDX-License-Identifier: Apache-2.0
"""Rows of fewer elements: projected on the directions in which a sample of them varies most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.index.coding import Asked, Coding, SealedRows
from kvstore.retrieval.index.partitions import check_partitions


@dataclass(frozen=True, slots=True)
class ReducedCoding:
    """Rows without their mean, projected on principal directions, and coded by another coding.

    Source: PCA with float8 rows, arXiv:2505.00105; here per partition, without normalising, and with directions that
    may be weighed by how queries vary, since queries and keys of a model do not point the same way.

    Args:
        mean: [num_partitions, width] float32.
        down: [num_partitions, width, kept] float32: projects rows.
        up: [num_partitions, width, kept] float32: projects queries; inner products of both projections stand for those
            of the vectors.
        inner: codes the projections.
    """

    mean: Tensor
    down: Tensor
    up: Tensor
    inner: Coding

    @staticmethod
    def fitted(rows: Tensor, kept: int, inner: Coding, queries: Tensor | None = None) -> ReducedCoding:
        """Learn the directions.

        Args:
            rows: [num_partitions, num_rows, width] float32: a sample, at least `width` rows.
            kept: elements of a projection.
            inner: codes the projections.
            queries: [num_partitions, num_queries, width] float32: a sample of queries; None for plain PCA.

        Raises:
            ConfigError: `kept` is not 1 to `width`.
        """
        partitions, _, width = rows.shape
        if not 1 <= kept <= width:
            raise ConfigError(f"rows of {width} elements cannot be reduced to {kept}")
        mean = rows.mean(dim=1)
        spread = _moments(rows - mean[:, None])
        weigh = unweigh = torch.eye(width, device=rows.device).expand(partitions, -1, -1)
        if queries is not None:
            check_partitions(queries, partitions, width)
            # The sum of squared errors over these queries is least for PCA of rows that were multiplied by the root of
            # the queries' second moments; a little of every direction keeps the root invertible.
            values, vectors = torch.linalg.eigh(_moments(queries))
            roots = (values.clamp_min(0) + 1e-4 * values.amax(dim=-1, keepdim=True) + 1e-30).sqrt()
            weigh = (vectors * roots[:, None]) @ vectors.transpose(1, 2)
            unweigh = (vectors / roots[:, None]) @ vectors.transpose(1, 2)
        directions = torch.linalg.eigh(weigh @ spread @ weigh).eigenvectors[:, :, -kept:]
        return ReducedCoding(mean, weigh @ directions, unweigh @ directions, inner)

    @property
    def device(self) -> torch.device:
        """See `Coding`."""
        return self.inner.device

    def seal(self, rows: Tensor) -> SealedRows:
        """See `Coding`."""
        return self.inner.seal(torch.bmm(rows - self.mean[:, None], self.down))

    def score(self, asked: Sequence[Asked]) -> None:
        """See `Coding`."""
        self.inner.score([Asked(each.segments, torch.bmm(each.queries, self.up), each.scores) for each in asked])
        for each in asked:
            # Tails are compared exactly, so the scores of reduced rows need what their mean adds.
            each.scores[:, :, : sum(rows.num_rows for rows in each.segments)] += each.queries @ self.mean[:, :, None]


def _moments(rows: Tensor) -> Tensor:
    """Second moments: `[num_partitions, width, width]`."""
    return rows.transpose(1, 2) @ rows / max(rows.shape[1], 1)
