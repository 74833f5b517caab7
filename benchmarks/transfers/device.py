# SPDX-License-Identifier: Apache-2.0
"""Host to device and back by size, beside one pinned copy of as many bytes. Needs a GPU; not run yet."""

from __future__ import annotations

import torch

from harness import Report, check
from kvstore.native import Arena, copy_to_device, copy_to_host
from kvstore.tiers.device.copies import copy_costs
from transfers.rounds import Call, rounds

_CALL_NBYTES = 64 << 20


def bench_device(report: Report, sizes: list[int], least: int) -> None:
    """Scattered pieces through the extension, in one call; the limit is one contiguous pinned copy."""
    arena = Arena(_CALL_NBYTES, True)
    host = torch.frombuffer(arena, dtype=torch.uint8)
    pinned = torch.empty(_CALL_NBYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(_CALL_NBYTES, dtype=torch.uint8, device="cuda")
    target = (device.data_ptr(), _CALL_NBYTES)
    stream = torch.cuda.Stream()
    for size in sizes:
        order = torch.randperm(_CALL_NBYTES // size).tolist()
        runs = [(number * size, place * size, size) for number, place in enumerate(order)]
        host.random_(0, 256)
        expected = host.clone()
        copy_to_device(arena, target, runs, False, stream.cuda_stream)
        stream.synchronize()
        host.zero_()
        copy_to_host(target, arena, runs, True, stream.cuda_stream)
        stream.synchronize()
        check(torch.equal(host, expected), f"pieces of {size} bytes came back changed")
        for way in ("host->device", "device->host"):
            goes_down = way == "host->device"

            costs = copy_costs(torch.cuda.current_device(), to_device=goes_down)
            by_kernel = costs.prefers_kernel(len(runs), _CALL_NBYTES)

            def ours(
                goes_down: bool = goes_down,
                runs: list[tuple[int, int, int]] = runs,
                by_kernel: bool = by_kernel,
            ) -> None:
                if goes_down:
                    copy_to_device(arena, target, runs, by_kernel, stream.cuda_stream)
                else:
                    copy_to_host(target, arena, runs, by_kernel, stream.cuda_stream)
                stream.synchronize()

            def limit(goes_down: bool = goes_down) -> None:
                into, source = (device, pinned) if goes_down else (pinned, device)
                into.copy_(source, non_blocking=True)
                torch.cuda.synchronize()

            timings = rounds({"batched copies": Call(ours), "pinned copy": Call(limit)}, least=least, most_s=1.0)
            found, against = ("batched copies", timings["batched copies"]), ("pinned copy", timings["pinned copy"])
            case = {"way": way, "size": size, "by_kernel": by_kernel, "gpu": torch.cuda.get_device_name()}
            report.rate("transfer", _CALL_NBYTES / 1e9, "GB/s", found, against, **case)
