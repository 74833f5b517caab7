# SPDX-License-Identifier: Apache-2.0
"""External retrievers: vectors that a user brings for blocks, such as CLIP images, poses or embeddings of speech."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.retrieval.index.partitions import MatrixIndex


class ExternalVectors:
    """Vectors of one kind for some of a stream's blocks, compared by cosine. Not thread-safe.

    A question brings a vector of the same kind, and `scores` says which blocks are most like it. As `ExtraScores`, by
    `UnitTable.best_of_blocks`, they are fused with a policy's own scores by rank, so the two need no common scale. Not
    every block needs a vector: those without rank last here, and are found by the model's own keys all the same.

    Args:
        dim: elements of a vector.

    Raises:
        ConfigError: `dim` is not positive.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ConfigError(f"external vectors of {dim} elements; they must have at least one")
        self._dim = dim
        self._directions = MatrixIndex(1, dim)
        self._blocks: list[int] = []

    @property
    def num_vectors(self) -> int:
        """Vectors added so far."""
        return self._directions.num_rows

    def add(self, blocks: Tensor, vectors: Tensor) -> None:
        """Add vectors; a block may have several, of its frames say, and the best of them counts.

        Args:
            blocks: [num_vectors] int64: which block of the stream each belongs to, in any order.
            vectors: [num_vectors, dim], any float dtype; only their direction counts.

        Raises:
            ShapeError: the two do not fit each other, or vectors are not of `dim` elements.
            ConfigError: a block index is negative; a vector is zero or not finite.
        """
        if blocks.dim() != 1 or blocks.is_floating_point() or vectors.shape[:1] != blocks.shape:
            raise ShapeError(f"{list(vectors.shape)} vectors for {list(blocks.shape)} {blocks.dtype} block indices")
        if blocks.shape[0] and int(blocks.min()) < 0:
            raise ConfigError(f"a vector for block {int(blocks.min())}; blocks count from 0")
        self._directions.add(self._checked(vectors)[None])
        self._blocks += blocks.tolist()

    def scores(self, query: Tensor, num_blocks: int) -> Tensor:
        """Compare a question's vector with all blocks.

        Args:
            query: [dim], any float dtype.
            num_blocks: of the stream.

        Returns:
            [num_blocks] float32: largest cosine of the block's vectors with the query; -inf for a block without any.

        Raises:
            ShapeError: the query is not of `dim` elements.
            ConfigError: it is zero or not finite; there are vectors for blocks that the stream does not have.
        """
        asking = self._checked(query[None])
        if self._blocks and max(self._blocks) >= num_blocks:
            unknown = sorted({block for block in self._blocks if block >= num_blocks})
            raise ConfigError(
                f"vectors were added for blocks {unknown[:8]}, and the stream has {num_blocks}; add them under the "
                "indices of blocks that are stored"
            )
        best = torch.full((num_blocks,), float("-inf"))
        if self._blocks:
            found = self._directions.scores(asking[None])[0, 0]
            best.scatter_reduce_(0, torch.tensor(self._blocks), found, "amax")
        return best

    def _checked(self, vectors: Tensor) -> Tensor:
        """The directions of vectors, or why they have none: `[num_vectors, dim]` float32."""
        if vectors.dim() != 2 or vectors.shape[1] != self._dim or not vectors.is_floating_point():
            raise ShapeError(
                f"external vectors are [n, {self._dim}] of a float dtype; got {list(vectors.shape)} {vectors.dtype}"
            )
        wide = vectors.detach().to("cpu", torch.float64)  # the square of a large float32 is not finite
        norms: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        bad = ((norms == 0) | ~norms.isfinite()).flatten().nonzero().flatten()
        if bad.shape[0]:
            raise ConfigError(f"external vectors {bad[:8].tolist()} are zero or not finite; they have no direction")
        return (wide / norms).float()
