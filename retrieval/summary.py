# SPDX-License-Identifier: Apache-2.0
"""Summaries: the small vectors that stand for a block in an index, and their stored form."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError

_MAGIC = b"KVS0"
_HEADER = struct.Struct("<4sI")
_SECTION = struct.Struct("<BBHIIQ")  # kind, dtype, reserved, rows, columns, nbytes
_DTYPES = {1: torch.int32, 2: torch.uint8}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class SummaryKind(IntEnum):
    """What a section of a stored summary holds: what cannot be made again from the block.

    POSITION: [rows, num_tokens] int32: RoPE positions, present where they are not first_token, first_token + 1, ...
    RECEIVED: [num_layers * kv_heads, num_tokens] uint8: attention that each token received before the block was stored,
        on a logarithmic scale.
    """

    POSITION = 3
    RECEIVED = 4


_STEPS = 16
_UNIT = 184

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


def summarise(positions: Tensor, received: Tensor, first_token: int) -> bytes:
    """Make a block's stored summary.

    Args:
        positions: [rows, num_tokens] int64 RoPE positions.
        received: [num_layers, kv_heads, num_tokens] float32 attention mass, at least 0.
        first_token: number of the first one in the stream.
    """
    parts = {SummaryKind.RECEIVED: _logarithms(received.flatten(0, 1))}
    numbers = torch.arange(first_token, first_token + positions.shape[1])
    if positions.shape[0] > 1 or not torch.equal(positions[0], numbers):
        parts[SummaryKind.POSITION] = positions.to(torch.int32)
    return Summary(parts).to_bytes()


def received_of(data: bytes, shape: Sequence[int]) -> Tensor:
    """Read the attention that a block's tokens received: `shape` is (num_layers, kv_heads, num_tokens).

    Returns:
        `shape` float32, within 2.3 % of what was stored; zeros where nothing usable is: a policy that looks for much
        noticed tokens then finds none, and the rest of the block's figures stand.
    """
    try:
        part = Summary.from_bytes(data).parts.get(SummaryKind.RECEIVED)
    except CorruptRecordError:
        part = None
    if part is None or part.shape != (shape[0] * shape[1], shape[2]) or part.dtype != torch.uint8:
        return torch.zeros(*shape)
    masses = torch.exp2((part.float() - _UNIT) / _STEPS)
    return masses.masked_fill_(part == 0, 0.0).view(*shape)


def _logarithms(masses: Tensor) -> Tensor:
    """Masses from 2^-11 to 2^4 in steps of a sixteenth octave; less is 0."""
    steps = (masses.clamp_min(torch.finfo(torch.float32).tiny).log2() * _STEPS).round() + _UNIT
    return steps.clamp(0, 255).to(torch.uint8)
