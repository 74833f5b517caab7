# SPDX-License-Identifier: Apache-2.0
"""Coding records on a GPU, kernels alone and with the way there or back, against copies of plain bytes and nvCOMP."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import cycle, islice

import torch
from torch import Tensor

from coders import calibration_of
from harness import MIN_ITERATIONS, MIN_S, WARM_UPS, Report, Timing, alternate, check, options
from kvstore.codec import Codec, Profile
from kvstore.layout import BlockLayout
from kvstore.native import Arena, build_info
from kvstore.spec import ModelSpec
from kvstore.tiers.device.decode import DeviceRecord, plan_decode
from kvstore.tiers.device.encode import DeviceBlock, encode_on_device

# Of a model with 8 KV heads of 128; a block of two layers is 2 MiB, so that batches grow by whole records.
LAYOUT = BlockLayout(ModelSpec(2, 8, 128, 128, "bfloat16", "pre", "llama", "{}", "0"), 128)
BLOCK_NBYTES = 2 << 20
DISTINCT = 4
PROFILES = (Profile.LOSSLESS, Profile.Q8, Profile.Q4, Profile.Q3, Profile.Q2)
NVCOMP_ALGORITHMS = ("ANS", "Zstd")


def made_slots() -> list[Tensor]:
    """Blocks of normal values with a scale per channel: made up, no model's."""
    chance = torch.Generator().manual_seed(0)
    slots = []
    for _ in range(DISTINCT):
        slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
        for rows in (LAYOUT.keys(slot), LAYOUT.values(slot)):
            rows.copy_(torch.randn(rows.shape, generator=chance) * torch.randn(rows.shape[-1], generator=chance).exp())
        slots.append(slot)
    return slots


def made_records(codec: Codec) -> list[tuple[Arena, int]]:
    """Records of those blocks in page-locked memory."""
    records = []
    for slot in made_slots():
        arena = Arena(codec.bound(LAYOUT.block_tokens), pinned=True)
        records.append((arena, codec.encode(slot, LAYOUT.block_tokens, 1, arena)))
    return records


def nvcomp_calls(plain: Tensor, stream: torch.cuda.Stream) -> dict[str, tuple[Callable[[], object], int]]:
    """Bit-exact rivals where nvCOMP's Python package is installed: a call that decodes `plain`, and its stored bytes.

    Args:
        plain: on the device, contiguous.
        stream: what all is queued on.
    """
    try:
        nvcomp = import_module("nvidia.nvcomp")
    except ImportError:
        return {}
    given = plain.flatten().view(torch.uint8)
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    for algorithm in NVCOMP_ALGORITHMS:
        codec = nvcomp.Codec(algorithm=algorithm, cuda_stream=stream.cuda_stream)
        stored = codec.encode(nvcomp.as_array(given))
        found = torch.empty_like(given)
        # With its configuration at hand, a decode only queues work: as our launch does.
        configured = codec.decompression_config(stored)
        call = partial(codec.decode, stored, out=found, decompression_config=configured)
        call()
        stream.synchronize()
        check(torch.equal(found, given), f"nvCOMP {algorithm} does not give back what it was given")
        calls[f"nvCOMP {algorithm}"] = call, stored.buffer_size
    return calls


def event_timing(call: Callable[[], object], stream: torch.cuda.Stream) -> Timing:
    """Time what a call queues on the stream, by the device's own clock."""
    samples: list[float] = []
    for _ in range(WARM_UPS):
        call()
    stream.synchronize()
    began = time.perf_counter()
    while len(samples) < MIN_ITERATIONS or time.perf_counter() - began < MIN_S:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record(stream)
        call()
        last.record(stream)
        last.synchronize()
        samples.append(first.elapsed_time(last) / 1e3)
    return Timing.of(samples)


def host_rows(codec: Codec, record: memoryview) -> tuple[Tensor, Tensor]:
    """Keys and values of a record, by the host's decoder."""
    keys, values = (torch.zeros(2, 8, 128, 128, dtype=torch.bfloat16) for _ in range(2))
    info = codec.probe(record)
    codec.decode_rows(info, record, 0, keys, values, layers=range(2), heads=range(8), tokens=range(128))
    return keys, values


def measure_batch(report: Report, profile: Profile, num_records: int, stream: torch.cuda.Stream) -> None:
    """One batch: every record is decoded to rows of its own."""
    codec = Codec(LAYOUT, profile)
    made = made_records(codec)
    targets = torch.zeros(num_records, 2, 2, 8, 128, 128, dtype=torch.bfloat16, device="cuda")
    records = []
    for (arena, nbytes), target in zip(islice(cycle(made), num_records), targets, strict=True):
        data = memoryview(arena)[:nbytes]
        records.append(DeviceRecord(codec, codec.probe(data), data, 0, range(2), target[0], target[1]))
    began = time.perf_counter()
    plan, _ = plan_decode(records)
    planned_s = time.perf_counter() - began
    workspace = torch.empty(plan.workspace_nbytes, dtype=torch.uint8, device="cuda")
    place = workspace.data_ptr(), workspace.nbytes
    plain = torch.zeros_like(targets)
    plain_host = torch.zeros(targets.shape, dtype=targets.dtype, pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plan.upload(place, stream.cuda_stream)
        plan.launch(place, stream.cuda_stream)
        check(not any(plan.faults(workspace[: plan.zeroed_nbytes].cpu().numpy().data)), f"{profile} is corrupt")
        for found, (arena, nbytes) in zip(targets[:DISTINCT], made, strict=False):
            for part, wanted in zip(found.cpu(), host_rows(codec, memoryview(arena)[:nbytes]), strict=True):
                same = torch.equal(part.view(torch.int16), wanted.view(torch.int16))
                check(same, f"{profile} differs from the host's decoder")
        copied = event_timing(lambda: plain.copy_(targets), stream)
        sent = event_timing(lambda: plain.copy_(plain_host, non_blocking=True), stream)
        kernels = event_timing(lambda: plan.launch(place, stream.cuda_stream), stream)

        def upload_and_decode() -> None:
            plan.upload(place, stream.cuda_stream)
            plan.launch(place, stream.cuda_stream)

        whole = event_timing(upload_and_decode, stream)
        rivals = nvcomp_calls(targets, stream) if profile is Profile.LOSSLESS else {}
        rival_timings = {name: event_timing(call, stream) for name, (call, _) in rivals.items()}
    amount = num_records * BLOCK_NBYTES / 1e9
    case = {"profile": str(profile), "mib": num_records * 2}
    report.rate("decode", amount, "GB/s", ("kvstore", kernels), ("copy on the device", copied), **case)
    size = num_records * BLOCK_NBYTES / sum(nbytes for _, nbytes in islice(cycle(made), num_records))
    for name, timing in rival_timings.items():
        report.rate("decode", amount, "GB/s", ("kvstore", kernels), (name, timing), **case)
        rival_size = num_records * BLOCK_NBYTES / rivals[name][1]
        report.value("size", "raw/stored", ("kvstore", size), (name, rival_size), **case)
    report.rate("upload and decode", amount, "GB/s", ("kvstore", whole), ("upload plain", sent), **case)
    upload_rate = amount / sent.median_s
    report.value(
        "plan and verify on the host", "GB/s", ("kvstore", amount / planned_s), ("upload plain", upload_rate), **case
    )


def measure_encode(report: Report, profile: Profile, num_records: int, stream: torch.cuda.Stream) -> None:
    """One batch of blocks, until their records are on the host; wall time, as the host assembles them."""
    slots = made_slots()
    calibration = calibration_of(LAYOUT.spec, [(LAYOUT.keys(slot), LAYOUT.values(slot)) for slot in slots])
    codec = Codec(LAYOUT, profile, calibration)
    rows = torch.stack([torch.stack([LAYOUT.keys(slot), LAYOUT.values(slot)]) for slot in slots]).cuda()
    batch = [rows[number % DISTINCT] for number in range(num_records)]
    blocks = [DeviceBlock(codec, LAYOUT.block_tokens, 1, keys, values) for keys, values in batch]
    out = memoryview(bytearray(codec.bound(LAYOUT.block_tokens)))
    wanted = [bytes(out[: codec.encode(slot, LAYOUT.block_tokens, 1, out)]) for slot in slots]
    stream.wait_stream(torch.cuda.current_stream())
    check(encode_on_device(blocks[:DISTINCT], stream) == wanted[: len(blocks)], f"{profile} differs from the host's")
    plain = torch.zeros(num_records, *rows.shape[1:], dtype=rows.dtype, device="cuda")
    plain_host = torch.zeros(plain.shape, dtype=plain.dtype, pin_memory=True)

    def download() -> None:
        plain_host.copy_(plain, non_blocking=True)
        torch.cuda.synchronize()

    timings = alternate({"kvstore": lambda: encode_on_device(blocks, stream), "download plain": download})
    against = ("download plain", timings["download plain"])
    case = {"profile": str(profile), "mib": num_records * 2, "clock": "wall"}
    amount = num_records * BLOCK_NBYTES / 1e9
    report.rate("encode and download", amount, "GB/s", ("kvstore", timings["kvstore"]), against, **case)


def main() -> None:
    """Measure batches of 2 to 512 MiB of KV."""
    settings = options("device-decode", __doc__)
    report = Report(settings, {"data": "made"})
    if not torch.cuda.is_available() or build_info()["cuda_devices"] == 0:
        print("# no CUDA device, or built without: nothing to measure")
        report.write()
        return
    stream = torch.cuda.Stream()
    for profile in PROFILES:
        for num_records in (1, 32) if settings.quick else (1, 4, 32, 256):
            measure_batch(report, profile, num_records, stream)
            if profile.is_lossy:
                measure_encode(report, profile, num_records, stream)
    report.write()


if __name__ == "__main__":
    main()
