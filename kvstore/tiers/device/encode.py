# SPDX-License-Identifier: Apache-2.0
"""Blocks encoded where attention left them: one warp a segment, so that what crosses the bus is small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.codec import Codec
from kvstore.errors import ConfigError, ShapeError
from kvstore.native import Calibration, EncodePlan, Geometry
from kvstore.record import DTYPES
from kvstore.tiers.device.decode import Pages, paging_of, place_of


@dataclass(frozen=True, slots=True)
class DeviceBlock:
    """One block to encode, and where its rows are.

    Args:
        codec: lossy, calibrated, keys too; not `pca` with bases.
        num_tokens: 1 to the layout's block_tokens.
        first_token: position of the block's first token in its stream.
        keys: one tensor a layer, [kv_heads, num_tokens, key_dim], or [pages, kv_heads, page_tokens, key_dim] with
            `pages`: any strides but contiguous in the last. [layers, ...] in one tensor does as well.
        values: likewise.
        pages: for paged rows.
    """

    codec: Codec
    num_tokens: int
    first_token: int
    keys: Sequence[Tensor] | Tensor
    values: Sequence[Tensor] | Tensor
    pages: Pages | None = None


def encode_on_device(blocks: Sequence[DeviceBlock], stream: torch.cuda.Stream | None = None) -> list[bytes | None]:
    """Encode blocks, byte for byte as `Codec.encode` does.

    Rows on the CPU are read by the same code, whose 32 lanes then take turns: slow, for comparing.

    Args:
        blocks: on one device.
        stream: any but the default one, which has passed what wrote the rows. None on the CPU only.

    Returns:
        Records; None for a block of which a plane does not shrink when quantised: `Codec.encode` has other codings.

    Raises:
        ShapeError: an argument does not fit.
        ConfigError: a codec that is not lossy, not calibrated, keeps keys exact or codes in bases; or this build has no
            CUDA.
        StoreIOError: the device refused.
    """
    if not blocks:
        return []
    devices = {tensor.device for block in blocks for tensor in (*block.keys, *block.values)}
    if len(devices) != 1:
        raise ShapeError(f"blocks of one batch are on one device; got {sorted(map(str, devices))}")
    device = devices.pop()
    plan = EncodePlan([_request(block) for block in blocks])
    if device.type == "cpu":
        workspace = torch.frombuffer(bytearray(plan.run_in_lockstep()), dtype=torch.uint8)
        return _records(plan, workspace)
    if stream is None:
        raise ConfigError(f"encoding on {device} needs a stream of yours")
    if device != stream.device:
        raise ShapeError(f"blocks are on {device}, the stream is of {stream.device}")
    with torch.cuda.stream(stream):
        workspace = torch.empty(plan.workspace_nbytes, dtype=torch.uint8, device=device)
        plan.launch((workspace.data_ptr(), workspace.nbytes), stream.cuda_stream)
        return _records(plan, workspace)


def _records(plan: EncodePlan, workspace: Tensor) -> list[bytes | None]:
    """Bring the planes to the host, as long as they have become, and make records of them."""
    results = workspace[: plan.results_nbytes].cpu().numpy().data
    records: list[bytes | None] = []
    for number, pieces in enumerate(plan.pieces(results)):
        planes = [workspace[offset : offset + nbytes].cpu().numpy().data for offset, nbytes in pieces]
        records.append(plan.assemble(number, results, planes) if planes else None)
    return records


_Place = tuple[int, int, int, int, int]
_Request = tuple[
    Geometry,
    int,
    int,
    int,
    tuple[int, int, bool, bool],
    Calibration | None,
    int,
    list[_Place],
    tuple[int, int, list[int]],
]


def _request(block: DeviceBlock) -> _Request:
    """What the native plan takes of a block."""
    geometry, dtype, num_tokens, profile, steps, calibration = block.codec.writer(block.num_tokens)
    if not 0 <= block.first_token < 1 << 64:
        raise ShapeError(f"first_token is {block.first_token}; it must be 0 to 2^64 - 1")
    if not len(block.keys) == len(block.values) == geometry.num_layers:
        raise ShapeError(f"{len(block.keys)} keys and {len(block.values)} values for {geometry.num_layers} layers")
    paging = paging_of(block.pages)
    sources = [
        place_of(rows, (geometry.kv_heads, num_tokens, dim), DTYPES[dtype], block.pages)
        for layer in zip(block.keys, block.values, strict=True)
        for rows, dim in zip(layer, (geometry.key_dim, geometry.value_dim), strict=True)
    ]
    return geometry, dtype, num_tokens, profile, steps, calibration, block.first_token, sources, paging
