# SPDX-License-Identifier: Apache-2.0
"""Encoding and decoding blocks of real KV: each profile against a memory copy and against plain zstd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any, NamedTuple

import torch
import zstandard
from torch import Tensor

from harness import Report, Timing, alternate, check, options
from kvstore.codec import Codec, Profile
from kvstore.layout import BlockLayout
from real_kv import Corpus, add_options, corpus


def tokens_of(layout: BlockLayout, slot: Tensor, num_tokens: int) -> list[Tensor]:
    """The stored part of a slot, keys and values, as contiguous tensors."""
    return [part(slot)[:, :, :num_tokens].contiguous() for part in (layout.keys, layout.values)]


class Coder(NamedTuple):
    """Calls that encode and decode the next block, and the bytes that all blocks take when encoded."""

    encode: Callable[[], object]
    decode: Callable[[], object]
    nbytes: int


def copier(kv: Corpus) -> Callable[[], None]:
    """A call that copies the next slot, in one thread."""
    target = memoryview(bytearray(kv.layout.slot_nbytes))
    sources = cycle([slot.numpy().data for slot in kv.slots])

    def copy() -> None:
        target[:] = next(sources)

    return copy


def codec_calls(kv: Corpus, profile: Profile) -> Coder:
    """A profile; the round trip is checked first."""
    codec = Codec(kv.layout, profile)
    records: list[memoryview] = []
    decoded = torch.zeros_like(kv.slots[0])
    for slot, num_tokens in zip(kv.slots, kv.num_tokens, strict=True):
        out = memoryview(bytearray(codec.bound(num_tokens)))
        records.append(out[: codec.encode(slot, num_tokens, 0, out)])
        codec.decode(records[-1], decoded, num_tokens=num_tokens)
        pairs = zip(tokens_of(kv.layout, slot, num_tokens), tokens_of(kv.layout, decoded, num_tokens), strict=True)
        for before, after in pairs:
            if profile.is_lossy:
                error = float((before.float() - after.float()).abs().max() / before.float().abs().max())
                limit = 0.02 if profile is Profile.Q8 else 0.3
                check(error < limit, f"{profile} is off by {error:.3f} of the largest element")
            else:
                check(torch.equal(before, after), f"{profile} does not give back what it was given")
    out = memoryview(bytearray(codec.bound(max(kv.num_tokens))))
    blocks = cycle(list(zip(kv.slots, kv.num_tokens, records, strict=True)))

    def encode() -> None:
        slot, num_tokens, _ = next(blocks)
        codec.encode(slot, num_tokens, 0, out)

    def decode() -> None:
        _, num_tokens, record = next(blocks)
        codec.decode(record, decoded, num_tokens=num_tokens)

    return Coder(encode, decode, sum(len(record) for record in records))


def zstd_calls(kv: Corpus, level: int) -> Coder:
    """The same for zstd over a block's bytes as they lie."""
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    plain = [
        torch.cat([part.flatten().view(torch.uint8) for part in tokens_of(kv.layout, slot, num_tokens)]).numpy().data
        for slot, num_tokens in zip(kv.slots, kv.num_tokens, strict=True)
    ]
    frames = [compressor.compress(block) for block in plain]
    check(decompressor.decompress(frames[0]) == bytes(plain[0]), "zstd round trip")
    sources, records = cycle(plain), cycle(frames)
    return Coder(
        lambda: compressor.compress(next(sources)),
        lambda: decompressor.decompress(next(records)),
        sum(len(frame) for frame in frames),
    )


def main() -> None:
    """Measure one block per call, one thread."""
    settings = options(__doc__ or "", add_options)
    kv = corpus(settings, 8 if settings.quick else 32)
    report = Report("codec", settings)
    block_nbytes = kv.raw_nbytes / len(kv.slots)
    case: dict[str, Any] = {"origin": kv.origin, "blocks": len(kv.slots), "mean_block_nbytes": round(block_nbytes)}
    coders = {str(profile): codec_calls(kv, profile) for profile in Profile}
    coders |= {f"zstd-{level}": zstd_calls(kv, level) for level in (1, 3)}
    for verb in ("encode", "decode"):
        calls = {name: coder.encode if verb == "encode" else coder.decode for name, coder in coders.items()}
        timings = alternate({"memcpy": copier(kv)} | calls)
        # A slot is copied whole; the blocks in it may be shorter.
        copied = timings["memcpy"]
        share = block_nbytes / kv.layout.slot_nbytes
        copied = Timing(copied.median_s * share, copied.p10_s * share, copied.p90_s * share, copied.iterations)
        report.rate(verb, block_nbytes / 1e9, "GB/s", copied, coder="memcpy", **case)
        for name in calls:
            report.rate(verb, block_nbytes / 1e9, "GB/s", timings[name], ("memcpy", copied), coder=name, **case)
    for name, coder in coders.items():
        report.value("ratio", kv.raw_nbytes / coder.nbytes, "raw/stored", coder=name, **case)
    report.write()


if __name__ == "__main__":
    main()
