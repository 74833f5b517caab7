# SPDX-License-Identifier: Apache-2.0
"""Summaries: the small vectors that stand for a block in an index, and their stored form."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError

_MAGIC = b"KVS0"
_HEADER = struct.Struct("<4sI")
_SECTION = struct.Struct("<BBHIIQ")  # kind, dtype, reserved, rows, columns, nbytes
_DTYPES = {0: torch.float16, 1: torch.int32}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class SummaryKind(IntEnum):
    """What a section of a stored summary holds.

    MEAN_KEY: [num_layers, kv_heads * key_dim] float16, mean key of the block per layer (ReKV).
    RECEIVED_KEY: the same shape: mean over the tokens that received most attention, per layer and KV head (InfLLM).
    POSITION: [rows, num_tokens] int32: RoPE positions, present where they are not first_token, first_token + 1, ...
    """

    MEAN_KEY = 1
    RECEIVED_KEY = 2
    POSITION = 3


_KINDS = frozenset(int(kind) for kind in SummaryKind)


@dataclass(frozen=True, slots=True)
class Summary:
    """One block's summary: 2-D tensors by kind."""

    parts: dict[SummaryKind, Tensor]

    def to_bytes(self) -> bytes:
        """Serialise: magic, section count, then per section a header and its row-major little-endian bytes."""
        chunks = [_HEADER.pack(_MAGIC, len(self.parts))]
        for kind, part in self.parts.items():
            data = part.contiguous().view(torch.uint8).numpy().tobytes()
            chunks.append(_SECTION.pack(kind, _DTYPE_CODES[part.dtype], 0, part.shape[0], part.shape[1], len(data)))
            chunks.append(data)
        return b"".join(chunks)

    @staticmethod
    def from_bytes(data: bytes) -> Summary:
        """Parse what `to_bytes` wrote; unknown kinds are skipped, so that newer writers stay readable.

        Raises:
            CorruptRecordError: a length, dtype or shape does not add up.
        """
        if len(data) < _HEADER.size:
            raise CorruptRecordError(f"summary of {len(data)} bytes is shorter than its header")
        magic, count = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise CorruptRecordError(f"summary starts with {magic!r}, expected {_MAGIC!r}")
        parts: dict[SummaryKind, Tensor] = {}
        offset = _HEADER.size
        for _ in range(count):
            if len(data) - offset < _SECTION.size:
                raise CorruptRecordError("summary ends inside a section header")
            kind, code, _, rows, columns, nbytes = _SECTION.unpack_from(data, offset)
            offset += _SECTION.size
            dtype = _DTYPES.get(code)
            if dtype is None or nbytes != rows * columns * dtype.itemsize or nbytes > len(data) - offset:
                raise CorruptRecordError(f"summary section {kind}: {rows} x {columns} does not fit its {nbytes} bytes")
            if kind in _KINDS:
                buffer = (
                    torch.frombuffer(bytearray(data[offset : offset + nbytes]), dtype=torch.uint8)
                    if nbytes
                    else (torch.empty(0, dtype=torch.uint8))
                )
                parts[SummaryKind(kind)] = buffer.view(dtype).view(rows, columns)
            offset += nbytes
        return Summary(parts)


def summarise(keys: Tensor, positions: Tensor, received: Tensor) -> bytes:
    """Make a block's stored summary: everything that any policy may ask for later.

    Args:
        keys: [num_layers, kv_heads, num_tokens, key_dim] pre-RoPE keys, any device.
        positions: [rows, num_tokens] int64 RoPE positions.
        received: [num_layers, kv_heads, num_tokens] float32 attention mass.
    """
    keys = keys.cpu()
    parts = {
        SummaryKind.MEAN_KEY: mean_keys(keys),
        SummaryKind.RECEIVED_KEY: received_keys(keys, received),
    }
    first = int(positions[0, 0])
    if positions.shape[0] > 1 or not torch.equal(positions[0], torch.arange(first, first + positions.shape[1])):
        parts[SummaryKind.POSITION] = positions.to(torch.int32)
    return Summary(parts).to_bytes()


def mean_keys(keys: Tensor) -> Tensor:
    """Average a block's keys over its tokens.

    Args:
        keys: [num_layers, kv_heads, num_tokens, key_dim], any float dtype.

    Returns:
        [num_layers, kv_heads * key_dim] float16.

    Source: ReKV (arXiv:2503.00540), mean key per frame, without repeating KV heads: sums over a query group commute
    with the mean, so the ranking is the same at a fraction of the size.
    """
    return _half(keys.float().mean(dim=2).flatten(1))


def received_keys(keys: Tensor, received: Tensor, top: int = 4) -> Tensor:
    """Average the keys of the tokens that received most attention.

    Args:
        keys: [num_layers, kv_heads, num_tokens, key_dim].
        received: [num_layers, kv_heads, num_tokens] float32 attention mass from later queries, summed over the group.
        top: representative tokens per KV head.

    Returns:
        [num_layers, kv_heads * key_dim] float16.

    Source: InfLLM (arXiv:2402.04617), representative tokens by received attention; chosen per KV head, not per
    query head.
    """
    chosen = received.topk(min(top, received.shape[-1]), dim=-1).indices
    picked = keys.float().gather(2, chosen[..., None].expand(-1, -1, -1, keys.shape[-1]))
    return _half(picked.mean(dim=2).flatten(1))


def _half(vectors: Tensor) -> Tensor:
    """Round to float16; what is too large becomes the largest, because an infinity would spoil every comparison."""
    largest = torch.finfo(torch.float16).max
    return vectors.clamp(-largest, largest).half()
