# SPDX-License-Identifier: Apache-2.0
"""What attention to units is estimated from: the mean key, the number of tokens and the sum of values of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.retrieval.summarisers.bounds import reduce
from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Units


@dataclass(frozen=True, slots=True)
class Estimate:
    """Some units of each KV head; heads with fewer units than others are filled up with units of no tokens.

    Args:
        centroids: [kv_heads, num_units, key_dim] float32: mean keys, at their original positions.
        counts: [kv_heads, num_units] float32: tokens of each.
        value_sums: [kv_heads, num_units, value_dim] float32: sums of the values.
    """

    centroids: Tensor
    counts: Tensor
    value_sums: Tensor


class EstimateTable:
    """Mean keys, counts and value sums of the units of a layer, in growing tables. Not thread-safe.

    Args:
        kv_heads: of the model.
        key_dim: elements of a key.

    Source: RetroInfer (arXiv:2505.02922), the meta index of its clusters.
    """

    def __init__(self, kv_heads: int, key_dim: int) -> None:
        self._key_dim = key_dim
        self._num_units = 0
        self._rows = torch.empty(kv_heads, 0, key_dim + 1)  # how wide values are shows with the first

    def add(self, tokens: LayerTokens, units: Sequence[Units]) -> None:
        """Append units.

        Args:
            tokens: what they are cut from.
            units: one for all KV heads, or one for each, of equally many units.
        """
        kv_heads = tokens.keys.shape[0]
        both = torch.cat([tokens.rotated, tokens.values.float()], dim=2)
        per_head = list(units) * (kv_heads // len(units))
        sums = torch.cat(
            [
                reduce(both[head : head + 1, each.tokens - tokens.first], each, "sum")
                for head, each in enumerate(per_head)
            ]
        )
        counts = torch.stack([each.sizes for each in per_head])[:, :, None].float()
        means = sums[:, :, : self._key_dim] / counts
        self.append(torch.cat([means, counts, sums[:, :, self._key_dim :]], dim=2))

    def cut_back(self, num_units: int) -> None:
        """Forget the last units, all but `num_units`."""
        self._num_units = min(self._num_units, num_units)

    def of(self, units: Sequence[Tensor]) -> Estimate:
        """Look chosen units up: `[num_chosen]` int64 for each KV head."""
        rows = torch.nn.utils.rnn.pad_sequence(
            [table[chosen] for table, chosen in zip(self._rows, units, strict=True)], batch_first=True
        )
        centroids, counts, value_sums = rows.tensor_split([self._key_dim, self._key_dim + 1], dim=2)
        return Estimate(centroids, counts[:, :, 0], value_sums)

    def between(self, first: int, end: int) -> Tensor:
        """The rows of some units: `[kv_heads, end - first, any]` float32."""
        return self._rows[:, first:end]

    def append(self, rows: Tensor) -> None:
        """Append what `between` returned, of another table.

        Raises:
            ShapeError: rows of another width.
        """
        if self._num_units and rows.shape[2] != self._rows.shape[2]:
            raise ShapeError(f"estimates of {rows.shape[2]} elements behind others of {self._rows.shape[2]}")
        needed = self._num_units + rows.shape[1]
        if needed > self._rows.shape[1]:
            grown = torch.empty(rows.shape[0], max(needed, 2 * self._rows.shape[1]), rows.shape[2])
            if self._num_units:
                grown[:, : self._num_units] = self._rows[:, : self._num_units]
            self._rows = grown
        self._rows[:, self._num_units : needed] = rows
        self._num_units = needed
