# SPDX-License-Identifier: Apache-2.0
"""Encoding and decoding blocks of real KV: each profile against a memory copy and against plain zstd."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch

from coders import Coder, Verb, calibrated, codec_coder, copier, rearranged, zstd_coder
from harness import MIN_S, Report, Timing, alternate, check, cpu, options, wall
from kvstore.calibration import Calibration
from kvstore.codec import Codec, Profile, plane_span
from kvstore.native import build_info, limit_simd
from real_kv import Corpus, add_options, corpus

LEVELS = {"plain": "baseline", "avx2": "avx2", "avx512": "avx512"}
BASELINES = ("memcpy", "zstd-1", "zstd-3")
QUICK_MIN_S = 0.1
BLOCKS_IN_TURN = 4
PARTIAL_LAYERS, PARTIAL_HEADS = 32, 16
"""Of a model of 8 billion parameters: 32 layers of 1,024 channels."""
DEEP_BLOCKS = 4
PARTIAL_LIMIT = 1 / 20
"""Most that one layer of `PARTIAL_LAYERS` may cost of a whole block, in time and in bytes."""
ALONE = [profile for profile in Profile if profile is not Profile.PCA]
"""Profiles of which a layer is coded alone. `pca` codes several together: reading one reads its group up to there."""


def one_after_another(verb: Verb, num_blocks: int) -> Callable[[], object]:
    """A call that codes the next block."""
    blocks = cycle(range(num_blocks))
    return lambda: verb(next(blocks))


def run_all(verb: Verb, blocks: Sequence[int]) -> None:
    """Code some blocks."""
    for block in blocks:
        verb(block)


def pairs(names: Collection[str]) -> list[tuple[str, str]]:
    """(coder, baseline) of those; baselines themselves are compared with the first one."""
    return [
        (name, baseline)
        for name in names
        for baseline in (BASELINES[:1] if name in BASELINES else BASELINES)
        if baseline in names
    ]


def report_rates(report: Report, verb: str, amount: float, timings: dict[str, Timing], **case: Any) -> None:
    """Every coder against every baseline that was measured with it."""
    for name, baseline in pairs(timings):
        report.rate(verb, amount, "GB/s", (name, timings[name]), (baseline, timings[baseline]), **case)


def shape_of(kv: Corpus) -> str:
    """Layers, KV heads and head dim."""
    spec = kv.layout.spec
    return f"{spec.num_layers}x{spec.kv_heads}x{spec.key_dim}"


def coders_of(kv: Corpus, calibration: Calibration) -> dict[str, Coder]:
    """All profiles and their baselines; `pca` where the calibration has bases."""
    profiles = [profile for profile in Profile if profile is not Profile.PCA or calibration.has_bases]
    coders = {"memcpy": copier(kv)} | {str(profile): codec_coder(kv, profile, calibration) for profile in profiles}
    return coders | {f"zstd-{level}": zstd_coder(kv, level) for level in (1, 3)}


def bench_one_thread(report: Report, kv: Corpus, coders: dict[str, Coder], simd: str, min_s: float) -> None:
    """Both verbs, and decoding into rows, one block a call; processor time."""
    limit_simd(LEVELS[simd])
    amount = kv.raw_nbytes / len(kv.slots) / 1e9
    verbs: dict[tuple[str, str], dict[str, Verb]] = {
        ("encode", "slot"): {name: coder.encode for name, coder in coders.items()},
        ("decode", "slot"): {name: coder.decode for name, coder in coders.items()},
        ("decode", "rows"): {name: coder.decode_rows for name, coder in coders.items() if coder.decode_rows},
    }
    for (verb, out), named in verbs.items():
        calls = {name: one_after_another(call, len(kv.slots)) for name, call in named.items()}
        timings = alternate(calls, clock=cpu, min_s=min_s)
        report_rates(report, verb, amount, timings, kv=shape_of(kv), out=out, simd=simd, threads=1, clock="cpu")
    limit_simd(LEVELS["avx512"])


def bench_two_threads(report: Report, kv: Corpus, coders: dict[str, Coder], simd: str, min_s: float) -> None:
    """Decode some blocks, in one thread and in two; wall time.

    Threads keep to a core each, as what takes milliseconds is over before the system spreads it. Each coder scales by
    its best decile: two threads never have two cores while neighbours take one.
    """
    blocks = range(min(BLOCKS_IN_TURN, len(kv.slots) // 2 * 2))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("# one core: two threads are not measured")
        return
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {core})))
            for core in cores[:2]
        ]

        def in_one(verb: Verb) -> Callable[[], object]:
            return lambda: pools[0].submit(run_all, verb, blocks).result()

        def in_two(verb: Verb) -> Callable[[], object]:
            def call() -> None:
                for future in [pool.submit(run_all, verb, blocks[n::2]) for n, pool in enumerate(pools)]:
                    future.result()

            return call

        one = {name: in_one(coder.decode) for name, coder in coders.items()}
        two = {f"{name} in two": in_two(coder.decode) for name, coder in coders.items()}
        timings = alternate(one | two, clock=wall, min_s=min_s)
    amount = sum(kv.num_tokens[block] for block in blocks) * kv.layout.spec.token_nbytes / 1e9
    case: dict[str, Any] = {"kv": shape_of(kv), "out": "slot", "simd": simd, "threads": 2, "clock": "wall"}
    report_rates(report, "decode", amount, {name: timings[f"{name} in two"] for name in coders}, **case)
    for name in coders:
        gain = timings[name].p10_s / timings[f"{name} in two"].p10_s
        report.value("decode, scaling", "x", (name, gain), ("one thread", 1.0), **case)


def bench_partial(report: Report, deep: Corpus, profile: Profile, simd: str, min_s: float) -> None:
    """Decode one layer of many, and all of them, from the bytes of the record that each needs; processor time."""
    codec = Codec(deep.layout, profile, calibrated(deep) if profile.is_lossy else None)
    everything = range(PARTIAL_LAYERS)
    block = len(deep.slots) - 1
    slot = torch.zeros_like(deep.slots[block])
    out = memoryview(bytearray(codec.bound(deep.layout.block_tokens)))
    record = out[: codec.encode(deep.slots[block], deep.num_tokens[block], deep.first_tokens[block], out)]
    info = codec.probe(record)
    singles = [range(layer, layer + 1) for layer in everything]
    spans = {layers: plane_span(info, layers) for layers in (everything, *singles)}

    def decode(layers: range) -> None:
        offset, nbytes = spans[layers]
        codec.decode_planes(info, record[offset : offset + nbytes], offset, slot, layers=layers)

    turns = cycle(singles)
    calls = {"one layer": lambda: decode(next(turns)), "all layers": lambda: decode(everything)}
    timings = alternate(calls, clock=cpu, min_s=min_s)
    one, whole = timings["one layer"], timings["all layers"]
    share = max(spans[single][1] for single in singles) / spans[everything][1]
    case: dict[str, Any] = {"coder": str(profile), "layers": PARTIAL_LAYERS, "simd": simd, "threads": 1, "clock": "cpu"}
    report.latency("partial decode", ("one layer", one), ("all layers", whole), **case)
    report.value("partial read, largest layer", "of all", ("one layer", share), ("all layers", 1.0), **case)
    for what, cost in {"time": one.median_s / whole.median_s, "bytes": share}.items():
        check(cost <= PARTIAL_LIMIT, f"{profile}: one layer of {PARTIAL_LAYERS} costs {cost:.3f} of the {what}")


def main() -> None:
    """Measure all profiles over the corpus that calibrated them."""
    settings = options("codec", __doc__, add_options)
    min_s = QUICK_MIN_S if settings.quick else MIN_S
    kv = corpus(settings, 8 if settings.quick else 32)
    case = {"origin": kv.origin, "blocks": len(kv.slots), "block_tokens": kv.layout.block_tokens}
    report = Report(settings, {**case, "dtype": kv.layout.spec.dtype, "calibrated": "by moments of these blocks"})
    calibration = calibrated(kv, with_bases=True)
    coders = coders_of(kv, calibration)
    if not calibration.has_bases:
        print("# pca is left out: too few tokens, or too many channels a layer, for bases; it would be q2")
    smaller = {name: kv.raw_nbytes / coder.nbytes for name, coder in coders.items()}
    for name, baseline in pairs(coders):
        report.value("size", "raw/stored", (name, smaller[name]), (baseline, smaller[baseline]))
    found = build_info()["simd"].split(",")
    levels = ["plain", *(level for level in LEVELS if level in found)]
    few = slice(DEEP_BLOCKS)
    first = replace(kv, slots=kv.slots[few], num_tokens=kv.num_tokens[few])
    deep = rearranged(first, PARTIAL_LAYERS, PARTIAL_HEADS)
    for profile in ALONE:
        bench_partial(report, deep, profile, levels[-1], min_s)
    for simd in reversed(levels):
        bench_one_thread(report, kv, coders, simd, min_s)
    deep_coders = coders_of(deep, calibrated(deep))
    bench_one_thread(report, deep, deep_coders, levels[-1], min_s)
    for blocks, coded in ((kv, coders), (deep, deep_coders)):
        bench_two_threads(report, blocks, coded, levels[-1], min_s)
    report.write()


if __name__ == "__main__":
    main()
