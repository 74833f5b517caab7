# SPDX-License-Identifier: Apache-2.0
"""What one layer attends to: a contiguous, growing run of keys and values, the placed past first, then the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.errors import ShapeError

_SPARE_TOKENS = 256


class LayerContext:
    """Keys and values of one layer in attention order, `[batch, kv_heads, tokens, dim]`.

    The past is replaced when another selection or another window is to be attended; the tail (tokens of the running
    forwards) is only appended to, so a decode step writes one row and copies nothing. Buffers grow by doubling.
    Buffers are never inference tensors, so a question begun in inference mode may go on outside it.
    Not thread-safe: the engine's thread owns it.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.num_past = 0
        self.num_tail = 0

    @property
    def batch(self) -> int:
        """Sequences held: 1 until a larger batch is appended."""
        return self._keys.shape[0] if self._keys is not None else 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_past(self, keys: Tensor, values: Tensor) -> None:
        """Replace the past and keep the tail.

        Args:
            keys: [1, kv_heads, num_past, key_dim], already at their positions.
            values: [1, kv_heads, num_past, value_dim].
        """
        num_past, start = keys.shape[2], self.num_past
        end = num_past + self.num_tail
        old_keys, old_values = self._keys, self._values
        batch = old_keys.shape[0] if old_keys is not None and self.num_tail else 1
        fits = old_keys is not None and end <= old_keys.shape[2] <= 2 * (end + _SPARE_TOKENS)
        if old_keys is None or not fits or old_keys.shape[0] != batch:
            self._keys = _buffer(keys, batch, end + _SPARE_TOKENS)
            self._values = _buffer(values, batch, end + _SPARE_TOKENS)
        assert self._keys is not None, "just made"
        assert self._values is not None, "likewise"
        is_moved = num_past != start or old_keys is not self._keys
        if old_keys is not None and old_values is not None and self.num_tail and is_moved:
            tail = slice(start, start + self.num_tail)
            # Copies: in one buffer the two places may overlap.
            self._keys[:, :, num_past:end] = old_keys[:, :, tail].clone()
            self._values[:, :, num_past:end] = old_values[:, :, tail].clone()
        self._keys[:, :, :num_past] = keys
        self._values[:, :, :num_past] = values
        self.num_past = num_past

    @torch.inference_mode(False)
    @torch.no_grad()
    def replace(self, heads: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put other tokens in the place of some of the past, in all sequences.

        Args:
            heads: [num_replaced] int64: KV head of each.
            rows: [num_replaced] int64: its row of the past.
            keys: [num_replaced, key_dim], at their positions.
            values: [num_replaced, value_dim].
        """
        assert self._keys is not None, "there is a past"
        assert self._values is not None, "of both"
        self._keys[:, heads, rows] = keys
        self._values[:, heads, rows] = values

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens to the tail.

        Args:
            keys: [batch, kv_heads, num_new, key_dim]; the first append fixes the batch.
            values: [batch, kv_heads, num_new, value_dim].

        Returns:
            (keys, values) of everything, past and tail: views that are valid until the next call.

        Raises:
            ShapeError: the batch differs from that of the tail.
        """
        batch, total = keys.shape[0], self.num_past + self.num_tail
        if self._keys is None or self._values is None:
            self._keys = _buffer(keys, batch, keys.shape[2] + _SPARE_TOKENS)
            self._values = _buffer(values, batch, values.shape[2] + _SPARE_TOKENS)
        if self._keys.shape[0] != batch:
            if self.num_tail:
                raise ShapeError(f"the tail holds {self._keys.shape[0]} sequences; these tokens are for {batch}")
            # Without a tail all sequences are the same past.
            self._keys = self._keys[:1].expand(batch, -1, -1, -1).contiguous()
            self._values = self._values[:1].expand(batch, -1, -1, -1).contiguous()
        need = total + keys.shape[2]
        if need > self._keys.shape[2]:
            self._keys, self._values = _grow(self._keys, total, need), _grow(self._values, total, need)
        self._keys[:, :, total:need] = keys
        self._values[:, :, total:need] = values
        self.num_tail += keys.shape[2]
        return self._keys[:, :, :need], self._values[:, :, :need]

    def drop_tail(self, num_tokens: int) -> None:
        """Forget the last tokens of the tail.

        Raises:
            ShapeError: the tail is shorter than that.
        """
        if num_tokens > self.num_tail:
            raise ShapeError(f"cannot drop {num_tokens} tokens; the tail holds {self.num_tail}")
        self.num_tail -= num_tokens

    @torch.inference_mode(False)
    @torch.no_grad()
    def take_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop sequences: row i becomes what row `rows[i]` was (beam search)."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, rows.to(self._keys.device))
            self._values = self._values.index_select(0, rows.to(self._values.device))


def _buffer(like: Tensor, batch: int, tokens: int) -> Tensor:
    return torch.empty(batch, like.shape[1], tokens, like.shape[3], dtype=like.dtype, device=like.device)


def _grow(buffer: Tensor, used: int, need: int) -> Tensor:
    grown = _buffer(buffer, buffer.shape[0], max(need + _SPARE_TOKENS, 2 * buffer.shape[2]))
    grown[:, :, :used] = buffer[:, :, :used]
    return grown
