# SPDX-License-Identifier: Apache-2.0
"""What codes blocks, to be timed: the codec's profiles, zstd over plain bytes, and a memory copy, all checked first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import zstandard
from torch import Tensor

from harness import check
from kvstore.bases import BasisSums
from kvstore.calibration import SINK_TOKENS, Calibration, calibrate
from kvstore.codec import Codec, Profile
from kvstore.layout import BlockLayout
from kvstore.moments import Moments
from kvstore.record import STEPS
from kvstore.spec import ModelSpec
from real_kv import Corpus

Verb = Callable[[int], object]
"""Codes the block of that number. Two calls may run at once where one number is even and the other odd."""


@dataclass(frozen=True, slots=True)
class Coder:
    """Something that codes the blocks of a corpus.

    Args:
        encode: a block into scratch memory.
        decode: a block into a slot; None where there is nothing to decode.
        decode_rows: a block into rows of one token each, as an engine may lay them out; None where it cannot.
        nbytes: of all blocks when encoded.
    """

    encode: Verb
    decode: Verb
    decode_rows: Verb | None
    nbytes: int


def calibrated(kv: Corpus, *, with_bases: bool = False) -> Calibration:
    """What the corpus itself looks like, by its moments; with bases where it has tokens enough for them."""
    samples = []
    for slot, num_tokens, first in zip(kv.slots, kv.num_tokens, kv.first_tokens, strict=True):
        tokens = slice(max(SINK_TOKENS - first, 0), num_tokens)
        samples.append((kv.layout.keys(slot)[:, :, tokens], kv.layout.values(slot)[:, :, tokens]))
    return calibration_of(kv.layout.spec, samples, with_bases=with_bases)


def calibration_of(
    spec: ModelSpec, samples: Sequence[tuple[Tensor, Tensor]], *, with_bases: bool = False
) -> Calibration:
    """Of keys and values [layers, heads, tokens, dim], however few."""
    sizes = (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim)
    moments = Moments(*sizes)
    bases = BasisSums(*sizes, sum(keys.shape[2] for keys, _ in samples)) if with_bases else None
    for keys, values in samples:
        moments.add(keys, values)
        if bases is not None:
            bases.add(keys, values)
    return calibrate(moments, bases=bases, min_tokens=1)


def rearranged(kv: Corpus, num_layers: int, kv_heads: int) -> Corpus:
    """The same blocks in the geometry of another model: real heads, again from the first where there are too few."""
    spec = replace(kv.layout.spec, num_layers=num_layers, kv_heads=kv_heads)
    layout = BlockLayout(spec, kv.layout.block_tokens)
    slots = []
    for source in kv.slots:
        slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
        for given, wanted in zip(parts_of(kv.layout, source), parts_of(layout, slot), strict=True):
            heads = given.flatten(0, 1)
            wanted[:] = heads[torch.arange(num_layers * kv_heads) % len(heads)].unflatten(0, (num_layers, kv_heads))
        slots.append(slot)
    return Corpus(layout, slots, kv.num_tokens, kv.origin)


def copier(kv: Corpus) -> Coder:
    """Copies of as many bytes as a block has, in one thread: the limit of what any coder can do."""
    sources = [
        slot.numpy()[: count * kv.layout.spec.token_nbytes] for slot, count in zip(kv.slots, kv.num_tokens, strict=True)
    ]
    targets = [np.zeros(kv.layout.slot_nbytes, np.uint8) for _ in range(2)]

    def copy(block: int) -> None:
        np.copyto(targets[block % 2][: len(sources[block])], sources[block])

    return Coder(copy, copy, copy, kv.raw_nbytes)


def zstd_coder(kv: Corpus, level: int) -> Coder:
    """Zstandard over a block's bytes as they lie."""
    compressors = [zstandard.ZstdCompressor(level=level) for _ in range(2)]
    decompressors = [zstandard.ZstdDecompressor() for _ in range(2)]
    plain = [
        torch.cat([part[:, :, :count].flatten().view(torch.uint8) for part in parts_of(kv.layout, slot)]).numpy().data
        for slot, count in zip(kv.slots, kv.num_tokens, strict=True)
    ]
    frames = [compressors[0].compress(block) for block in plain]
    check(decompressors[0].decompress(frames[0]) == bytes(plain[0]), "zstd round trip")
    return Coder(
        lambda block: compressors[block % 2].compress(plain[block]),
        lambda block: decompressors[block % 2].decompress(frames[block]),
        None,
        sum(map(len, frames)),
    )


def codec_coder(kv: Corpus, profile: Profile, calibration: Calibration) -> Coder:
    """A profile; lossy ones are calibrated."""
    codec = Codec(kv.layout, profile, calibration if profile.is_lossy else None)
    slots = [torch.zeros_like(kv.slots[0]) for _ in range(2)]
    room = [memoryview(bytearray(codec.bound(kv.layout.block_tokens))) for _ in range(2)]
    spec = kv.layout.spec
    # Tokens outermost but for layers: the heads of a token lie together, the tokens of a head apart.
    rows = [
        tuple(
            torch.zeros(spec.num_layers, kv.layout.block_tokens, spec.kv_heads, dim, dtype=part.dtype).transpose(1, 2)
            for dim, part in zip((spec.key_dim, spec.value_dim), parts_of(kv.layout, kv.slots[0]), strict=True)
        )
        for _ in range(2)
    ]

    def encode(block: int) -> int:
        return codec.encode(kv.slots[block], kv.num_tokens[block], kv.first_tokens[block], room[block % 2])

    records = [bytes(room[block % 2][: encode(block)]) for block in range(len(kv.slots))]

    def decode(block: int) -> None:
        codec.decode(records[block], slots[block % 2], num_tokens=kv.num_tokens[block])

    def decode_rows(block: int) -> None:
        keys, values = (part[:, :, : kv.num_tokens[block]] for part in rows[block % 2])
        wanted = (range(spec.num_layers), range(spec.kv_heads), range(kv.num_tokens[block]))
        info = codec.probe(records[block])
        codec.decode_rows(info, records[block], 0, keys, values, layers=wanted[0], heads=wanted[1], tokens=wanted[2])

    for block, count in enumerate(kv.num_tokens):
        decode(block)
        decode_rows(block)
        found = parts_of(kv.layout, slots[block % 2])
        for part, before, after in zip(rows[block % 2], parts_of(kv.layout, kv.slots[block]), found, strict=True):
            check(torch.equal(part[:, :, :count], after[:, :, :count]), f"{profile} decodes to rows as to a slot")
            _check_error(profile, before[:, :, :count], after[:, :, :count])
    return Coder(encode, decode, decode_rows, sum(map(len, records)))


def parts_of(layout: BlockLayout, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a slot, `[layers, heads, block_tokens, dim]`."""
    return layout.keys(slot), layout.values(slot)


def _check_error(profile: Profile, before: Tensor, after: Tensor) -> None:
    if not profile.is_lossy:
        check(torch.equal(before, after), f"{profile} does not give back what it was given")
        return
    # A uniform error within half a step has an rms of 0.29 steps; some channels have larger steps than others.
    limit = 0.5 * 2 ** (-min(STEPS[profile].key_mult, STEPS[profile].value_mult) / 8)
    error = float((before.float() - after.float()).square().mean().sqrt() / before.float().square().mean().sqrt())
    check(0 < error < limit, f"{profile} is off by {error:.3f} of the rms, more than {limit:.3f}")
