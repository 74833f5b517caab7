# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of other codecs for keys and values: what they give back, and how many bits they store for it.

Every function takes [layers, heads, tokens, dim] and returns a float32 tensor of that shape, and bits. Restated from
their descriptions; the sizes include whatever a reader needs.
"""

from __future__ import annotations

import torch
import zstandard
from torch import Tensor

BLOCK_TOKENS = 128
_SCALE_BITS = 16
_KIVI_GROUP = 32
_CACHEGEN_CHUNK = 256
_CACHEGEN_CDF_BITS = 16
_CACHEGEN_LENGTH_BITS = 32
_FLOAT8_LARGEST = 448.0

Lossy = tuple[Tensor, float]


def integers(x: Tensor, bits: int) -> Lossy:
    """One symmetric scale per (token, head)."""
    largest = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / largest).half().float().clamp_min(torch.finfo(torch.half).tiny)
    codes = (x / scale).round().clamp(-largest, largest)
    return codes * scale, x.numel() * bits + scale.numel() * _SCALE_BITS


def float8(x: Tensor) -> Lossy:
    """E4M3 without scales, as engines store it."""
    return x.clamp(-_FLOAT8_LARGEST, _FLOAT8_LARGEST).to(torch.float8_e4m3fn).float(), x.numel() * 8


def kivi_keys(x: Tensor, bits: int) -> Lossy:
    """KIVI (arXiv 2402.02750), K: asymmetric, per channel over groups of 32 tokens; no residual window."""
    restored, size = kivi_values(x.transpose(-1, -2), bits)
    return restored.transpose(-1, -2), size


def kivi_values(x: Tensor, bits: int) -> Lossy:
    """KIVI, V: asymmetric, per token over groups of 32 channels."""
    groups = x.unflatten(-1, (-1, _KIVI_GROUP))
    low = groups.amin(-1, keepdim=True).half().float()
    scale = ((groups.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    codes = ((groups - low) / scale.clamp_min(torch.finfo(torch.half).tiny)).round().clamp(0, 2**bits - 1)
    return (codes * scale + low).flatten(-2), x.numel() * bits + 2 * scale.numel() * _SCALE_BITS


def cachegen(x: Tensor, fine_layers: int) -> Lossy:
    """CacheGen (arXiv 2310.07240) as LMCache ships it: counted frequencies in every chunk, no anchors.

    A chunk of 256 tokens holds, beside the arithmetic-coded symbols, a scale for every (layer, token), and 33 cumulated
    frequencies and a length for every (layer, channel).

    Args:
        x: keys after RoPE, or values.
        fine_layers: leading layers with 32 bins; the others have 16.
    """
    layers, heads, tokens, dim = x.shape
    rows = x.transpose(1, 2).reshape(layers, tokens, heads * dim)
    most = torch.where(torch.arange(layers) < fine_layers, 15, 7)[:, None, None].float()
    scale = rows.abs().amax(-1, keepdim=True).bfloat16().float().clamp_min(torch.finfo(torch.bfloat16).tiny)
    codes = (rows * most / scale).round().clamp(-most, most)
    restored = (codes * scale / most).view(layers, tokens, heads, dim).transpose(1, 2)
    bits = float(scale.numel() * _SCALE_BITS)
    for chunk in (codes + most).long().split(_CACHEGEN_CHUNK, dim=1):
        counts = torch.nn.functional.one_hot(chunk, 32).sum(1).double()  # [layers, channels, bins]
        share = (counts / chunk.shape[1] * (0xFFFF - 32) + 1) / 0x10000
        payload = -(counts * share.log2()).sum(-1)
        bits += float((payload / 8).ceil().sum()) * 8
        bits += payload.numel() * (33 * _CACHEGEN_CDF_BITS + _CACHEGEN_LENGTH_BITS)
    return restored, bits


def zstd(x: Tensor, level: int, *, split: bool) -> Lossy:
    """zstd over blocks of 128 tokens, as the bytes lie, or high bytes and low bytes apart.

    Args:
        x: bfloat16.
        level: of zstd.
        split: whether the bytes are split.
    """
    compressor = zstandard.ZstdCompressor(level=level)
    nbytes = 0
    for block in x.split(BLOCK_TOKENS, dim=2):
        data = block.contiguous().view(torch.uint8)
        parts = [data[..., 0::2], data[..., 1::2]] if split else [data]
        nbytes += sum(len(compressor.compress(part.contiguous().numpy().data)) for part in parts)
    return x.float(), nbytes * 8
