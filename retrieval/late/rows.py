# SPDX-License-Identifier: Apache-2.0
"""Rows of late interaction: the direction of a token's keys in the compared layers, one byte per element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SCALE_NBYTES, _WORD_NBYTES = 4, 2
_STEPS = 127
_BATCH_ROWS = 2048


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Coded rows of consecutive tokens.

    Args:
        codes: [num_rows, width] int8; width is that of all compared layers together.
        scales: [num_rows] float32: value of one step of a row's codes.
    """

    codes: Tensor
    scales: Tensor

    @property
    def num_rows(self) -> int:
        """Rows, one for each token."""
        return self.codes.shape[0]

    @staticmethod
    def of(directions: Tensor) -> TokenRows:
        """Code `[num_rows, width]` float32; a row's largest element is the last step, so none is ever cut off.

        The error of a score with a unit vector has a standard deviation of about `0.29 * scale`, some 0.001.
        """
        scales = directions.abs().amax(dim=1).clamp_min(1e-20) / _STEPS
        return TokenRows((directions / scales[:, None]).round().to(torch.int8), scales)

    @staticmethod
    def joined(rows: Sequence[TokenRows], width: int) -> TokenRows:
        """One behind the other."""
        codes = torch.cat([torch.empty(0, width, dtype=torch.int8), *(each.codes for each in rows)])
        return TokenRows(codes, torch.cat([torch.empty(0), *(each.scales for each in rows)]))

    def products(self, directions: Tensor) -> Tensor:
        """Inner products of `[num, width]` float32 with all rows: `[num, num_rows]` float32."""
        found = torch.empty(directions.shape[0], self.num_rows)
        for first in range(0, self.num_rows, _BATCH_ROWS):
            some = slice(first, first + _BATCH_ROWS)
            torch.matmul(directions, self.codes[some].float().T, out=found[:, some])
        return found.mul_(self.scales)

    def decoded(self, width: int | None = None) -> Tensor:
        """The first `width` elements of the rows: `[num_rows, width]` float32."""
        return self.codes[:, :width].float() * self.scales[:, None]


def directions_of(keys: Tensor, mean: Tensor) -> Tensor:
    """Directions of keys, layer by layer: `[num_tokens, num_parts * part_dim]` float32, each part of length 1.

    Args:
        keys: [num_tokens, num_parts, part_dim] float32.
        mean: [num_parts, part_dim] float32, which all keys share and which says nothing.
    """
    return torch.nn.functional.normalize(keys - mean, dim=-1).flatten(1)


def are_scales(scales: Tensor) -> bool:
    """Whether `[any]` float32 may be scales of directions, of which no element is above 1."""
    return bool(((scales >= 0) & (scales <= 1)).all())


def pack_rows(rows: TokenRows, words: Tensor) -> bytes:
    """One block's rows as bytes: scales, words `[num_rows]` int64, codes; as many bytes as `packed_nbytes` says."""
    parts = (rows.scales.numpy().astype("<f4"), words.numpy().astype("<u2"), rows.codes.numpy())
    return b"".join(part.tobytes() for part in parts)


def packed_nbytes(num_rows: int, width: int) -> int:
    """Bytes of a block's packed rows."""
    return num_rows * (_SCALE_NBYTES + _WORD_NBYTES + width)


def unpack_rows(data: bytes, num_rows: int, width: int) -> tuple[TokenRows, Tensor] | None:
    """The rows and words that `pack_rows` packed; None if there are not as many, or their scales are no numbers."""
    if len(data) != packed_nbytes(num_rows, width) or num_rows == 0:
        return None
    words_at = num_rows * _SCALE_NBYTES
    codes_at = words_at + num_rows * _WORD_NBYTES
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    scales = whole[:words_at].view(torch.float32)
    if not are_scales(scales):
        return None
    words = torch.from_numpy(np.frombuffer(data, "<u2", num_rows, words_at).astype(np.int64))
    return TokenRows(whole[codes_at:].view(torch.int8).view(num_rows, width), scales), words
