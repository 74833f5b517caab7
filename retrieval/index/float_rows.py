# SPDX-License-Identifier: Apache-2.0
"""Floating-point rows, compared by torch's matrix product on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.index.coding import Asked
from kvstore.retrieval.index.lasting import lasting_copy

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class FloatRows:
    """Sealed rows as they came, but for the dtype.

    Args:
        rows: [num_partitions, num_rows, width] of one of `FLOAT_DTYPES`.
    """

    rows: Tensor

    @property
    def num_rows(self) -> int:
        """See `SealedRows`."""
        return self.rows.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """See `SealedRows`."""
        return (self.rows,)

    def decoded(self) -> Tensor:
        """See `SealedRows`."""
        return self.rows.float()

    def kept(self, wanted: Tensor) -> FloatRows:
        """See `SealedRows`."""
        # Bytes, because torch selects no float8 rows.
        chosen = self.rows.view(torch.uint8)[:, wanted.to(self.rows.device)]
        return FloatRows(chosen.view(self.rows.dtype))


@dataclass(frozen=True, slots=True)
class FloatCoding:
    """Rows of a floating-point dtype; sums are float32.

    float8 is e4m3, values beyond 448 cut off, and is widened segment by segment when it is compared: it saves memory,
    not time. Source of float8 rows: arXiv:2505.00105.

    Args:
        dtype: one of `FLOAT_DTYPES`.
        device: where rows are kept.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise ConfigError(f"rows of an index are one of {', '.join(map(str, FLOAT_DTYPES))}; got {self.dtype}")

    def seal(self, rows: Tensor) -> FloatRows:
        """See `Coding`."""
        if self.dtype is not torch.float32:
            largest = torch.finfo(self.dtype).max
            rows = rows.clamp(-largest, largest)
        if self.device.type == "cpu":
            return FloatRows(lasting_copy(rows.to(self.dtype)))
        return FloatRows(rows.to(self.device, self.dtype, copy=True).contiguous())

    def score(self, asked: Sequence[Asked]) -> None:
        """See `Coding`."""
        for each in asked:
            column = 0
            for segment in each.segments:
                assert isinstance(segment, FloatRows)
                end = column + segment.num_rows
                each.scores[:, :, column:end] = _products(each.queries, segment.rows)
                column = end


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    # Only bfloat16 has instructions that multiply it and sum in float32; queries lose by it what rows have lost.
    if rows.dtype is torch.bfloat16 or (rows.device.type != "cpu" and rows.dtype is torch.float16):
        return torch.bmm(queries.to(rows.dtype), rows.transpose(1, 2)).float()
    return torch.bmm(queries, rows.float().transpose(1, 2))
