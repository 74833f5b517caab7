# SPDX-License-Identifier: Apache-2.0
"""One byte per element: each channel of a segment in 255 steps between its smallest and its largest value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor

from kvstore.native import ByteRows as NativeRows
from kvstore.native import encode_byte_rows, score_byte_rows
from kvstore.retrieval.index.coding import Asked
from kvstore.retrieval.index.lasting import lasting, lasting_copy

BLOCK_ROWS = 16
GROUP_CHANNELS = 4


def codes_shape(num_partitions: int, num_rows: int, width: int) -> tuple[int, ...]:
    """Shape of the codes: blocks of rows, groups of channels, and inside a group, row by row, its channels."""
    return (num_partitions, -(-num_rows // BLOCK_ROWS), -(-width // GROUP_CHANNELS), BLOCK_ROWS, GROUP_CHANNELS)


class ByteRows:
    """Sealed rows of one byte per element. The native scorer reads them in place.

    Args:
        codes: `codes_shape(...)` uint8, contiguous; of a row or channel that is only padding, anything.
        low: [num_partitions, width] float32: value of code 0.
        step: [num_partitions, width] float32: value of one code more.
        num_rows: rows of each partition.
    """

    def __init__(self, codes: Tensor, low: Tensor, step: Tensor, num_rows: int) -> None:
        self.parts = (codes, low, step)
        self.num_rows = num_rows
        self.native = NativeRows(
            codes.numpy().data, low.numpy().data, step.numpy().data, low.shape[0], num_rows, low.shape[1]
        )

    def decoded(self) -> Tensor:
        """See `SealedRows`."""
        codes, low, step = self.parts
        plain = codes.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2)[:, : self.num_rows, : low.shape[1]]
        return plain * step[:, None] + low[:, None]

    def kept(self, wanted: Tensor) -> ByteRows:
        """See `SealedRows`."""
        codes, low, step = self.parts
        rows = codes.transpose(2, 3).flatten(1, 2)[:, wanted]
        # Copies, because a view would keep the pages of all rows.
        return ByteRows(_blocks(rows.flatten(2)), low.clone(), step.clone(), wanted.shape[0])


@dataclass(frozen=True, slots=True)
class ByteCoding:
    """A byte per element, on the CPU.

    Ranges are learnt per segment, so keys may drift over a stream, and per channel, because a few channels of a model's
    keys are many times larger than the others. What a query adds to all rows of a segment alike is added exactly; the
    error of a score has a standard deviation of about `0.29 * |q * step|`. Scores are the same on every machine.

    Source: 8-bit rows as in arXiv:2505.00105, there with one range for a whole collection.
    """

    @property
    def device(self) -> torch.device:
        """See `Coding`."""
        return torch.device("cpu")

    def seal(self, rows: Tensor) -> ByteRows:
        """See `Coding`."""
        partitions, num_rows, width = rows.shape
        shape = codes_shape(partitions, num_rows, width)
        channels = (partitions, width)
        pages = lasting((prod(shape) + 8 * prod(channels),), torch.uint8)
        codes, low, step = pages.split([prod(shape), 4 * prod(channels), 4 * prod(channels)])
        parts = (codes.view(shape), low.view(torch.float32).view(channels), step.view(torch.float32).view(channels))
        encode_byte_rows(rows.contiguous().numpy().data, *(part.numpy().data for part in parts), *rows.shape)
        return ByteRows(*parts, num_rows)

    def score(self, asked: Sequence[Asked]) -> None:
        """See `Coding`; by the native scorer, on as many threads as torch uses."""
        jobs = [
            (
                [cast(ByteRows, rows).native for rows in each.segments],
                each.queries.contiguous().numpy().data,
                each.scores.numpy().data,
                each.queries.shape[1],
                each.scores.shape[2],
            )
            for each in asked
        ]
        score_byte_rows(jobs, torch.get_num_threads())


def _blocks(codes: Tensor) -> Tensor:
    """`[num_partitions, num_rows, width]` uint8 in the order of `codes_shape`, in memory of its own."""
    partitions, rows, width = codes.shape
    shape = codes_shape(partitions, rows, width)
    padded = torch.zeros(partitions, shape[1] * BLOCK_ROWS, shape[2] * GROUP_CHANNELS, dtype=torch.uint8)
    padded[:, :rows, :width] = codes
    return lasting_copy(padded.view(partitions, shape[1], BLOCK_ROWS, shape[2], GROUP_CHANNELS).transpose(2, 3))
