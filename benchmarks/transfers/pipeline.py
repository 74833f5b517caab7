# SPDX-License-Identifier: Apache-2.0
"""Cold disk to decoded blocks: `Store.fetch` of a lossy profile beside its two stages, each alone."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import Report, Timing, check
from kvstore.calibration import Calibration, calibrate
from kvstore.codec import Codec, Profile
from kvstore.decision import Decision
from kvstore.layout import BlockLayout
from kvstore.moments import Moments
from kvstore.spec import ModelSpec, chain_key
from kvstore.store import Access, Durability, FetchRequest, Outcome, Store
from transfers.raw import RawFile
from transfers.rounds import Call, rounds

_BATCH = 32
_TOKENS = 128
_DECODE_THREADS = 2
_SOURCES = 8
_PIECE = 1 << 20


def _layout(num_layers: int) -> BlockLayout:
    """As of a model of 7 billion parameters with grouped queries, and `num_layers` layers."""
    return BlockLayout(ModelSpec(num_layers, 4, 128, 128, "bfloat16", "pre", "bench", "{}", "0"), _TOKENS)


def _slots(layout: BlockLayout) -> list[Tensor]:
    """Normally distributed K and V: what a quantised record of real KV costs, about."""
    chance = torch.Generator().manual_seed(3)
    slots = []
    for _ in range(_SOURCES):
        slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
        for view in (layout.keys(slot), layout.values(slot)):
            view.copy_(torch.randn(view.shape, generator=chance))
        slots.append(slot)
    return slots


def bench_pipeline(
    report: Report, library: ctypes.CDLL, folder: Path, place: str, *, num_layers: int, profile: Profile, least: int
) -> None:
    """One size of block and one profile; the limit is the slower one of disk and decoder."""
    layout = _layout(num_layers)
    sources = _slots(layout)
    count = 2 * _BATCH
    keys = [chain_key(None, number.to_bytes(8, "little"), "bench io") for number in range(count)]
    settings: dict[str, Any] = {"layout": layout, "profile": profile, "decode_threads": _DECODE_THREADS}
    calibration = _calibration(layout, sources) if profile.is_lossy else None
    writing: dict[str, Any] = {"access": Access.WRITE, "durability": Durability.NONE}
    with Store.open(folder / "store", host_nbytes=4 * layout.slot_nbytes, **writing, **settings) as store:
        if calibration is not None:
            store.calibrations.keep(layout.spec, calibration, Decision(calibration.id, 0, "the blocks themselves"))
        for start in range(0, count, _SOURCES):
            outcomes = store.put(keys[start : start + _SOURCES], sources, [_TOKENS] * _SOURCES)
            check(set(outcomes) == {Outcome.STORED}, f"a put ended as {set(outcomes)}")
    codec = Codec(layout, profile, calibration)
    records = [_encoded(codec, slot) for slot in sources]
    record_nbytes = sum(len(record) for record in records) / _SOURCES
    targets = [torch.zeros(layout.slot_nbytes, dtype=torch.uint8) for _ in range(_BATCH)]
    order = np.random.default_rng(5).permutation(count)
    halves = (order[:_BATCH], order[_BATCH:])
    # Two host slots: no batch finds the blocks of an earlier one in memory.
    with (
        ThreadPoolExecutor(_DECODE_THREADS) as threads,
        Store.open(folder / "store", access=Access.READ, host_nbytes=2 * layout.slot_nbytes, **settings) as store,
        closing(_noise_file(library, folder / "noise", round(_BATCH * record_nbytes))) as raw,
    ):
        turn = 0
        pieces = np.arange(len(raw.memory) // _PIECE, dtype=np.uint64) * np.uint64(_PIECE)

        def fetch() -> None:
            nonlocal turn
            turn += 1
            chosen = halves[turn % 2]
            requests = [FetchRequest(keys[number], slot) for number, slot in zip(chosen, targets, strict=True)]
            outcomes = store.fetch(requests).outcomes
            check(outcomes.count(Outcome.DISK) >= _BATCH - 2, f"a cold fetch ended with {outcomes}")

        def decode_one(item: int) -> None:
            codec.decode(records[item % _SOURCES], targets[item], num_tokens=_TOKENS)

        def decode() -> None:
            list(threads.map(decode_one, range(_BATCH)))

        def read() -> None:
            raw.move(pieces, _PIECE, 8, is_uring=False)

        _verify(fetch, decode, lambda: halves[turn % 2], targets)
        calls = {"fetch": Call(fetch), "disk": Call(read), "decoder": Call(decode)}
        timings = rounds(calls, least=least, most_s=6.0)
    raw_nbytes = _BATCH * layout.slot_nbytes
    scale = _BATCH * record_nbytes / len(raw.memory)  # the disk moved whole pieces
    disk = timings["disk"]
    timings["disk"] = Timing(scale * disk.median_s, scale * disk.p10_s, scale * disk.p90_s, disk.iterations)
    limit = max(("disk", "decoder"), key=lambda name: timings[name].median_s)
    case: dict[str, Any] = {
        "way": "disk->decoded",
        "size": layout.slot_nbytes,
        "profile": str(profile),
        "ratio": round(layout.slot_nbytes / record_nbytes, 2),
        "depth": _BATCH,
        "decode_threads": _DECODE_THREADS,
        "cold": "O_DIRECT",
        "place": place,
    }
    names = {"fetch": "Store.fetch", "disk": "O_DIRECT x ratio", "decoder": "decoder alone"}
    for name in ("fetch", *({"disk", "decoder"} - {limit})):
        found, against = (names[name], timings[name]), (names[limit], timings[limit])
        report.rate("fetch and decode", raw_nbytes / 1e9, "GB/s of raw KV", found, against, **case)


def _calibration(layout: BlockLayout, slots: list[Tensor]) -> Calibration:
    spec = layout.spec
    moments = Moments(spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim)
    for slot in slots * 4:  # fewer tokens are refused
        moments.add(layout.keys(slot), layout.values(slot))
    return calibrate(moments)


def _encoded(codec: Codec, slot: Tensor) -> bytes:
    out = bytearray(codec.bound(_TOKENS))
    return bytes(out[: codec.encode(slot, _TOKENS, 0, out)])


def _noise_file(library: ctypes.CDLL, path: Path, nbytes: int) -> RawFile:
    pieces = -(-nbytes // _PIECE)
    with path.open("wb") as file:
        for _ in range(pieces):
            file.write(np.random.default_rng(1).integers(0, 256, _PIECE, dtype=np.uint8).tobytes())
    return RawFile(library, path, pieces * _PIECE)


def _verify(fetch: Any, decode: Any, chosen: Any, targets: list[Tensor]) -> None:
    """What the store brings is what its records decode to."""
    decode()
    expected = [target.clone() for target in targets[:_SOURCES]]
    for target in targets:
        target.zero_()
    fetch()
    for number, target in zip(chosen(), targets, strict=True):
        check(torch.equal(target, expected[number % _SOURCES]), f"block {number} was brought with other bytes")
