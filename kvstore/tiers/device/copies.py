# SPDX-License-Identifier: Apache-2.0
"""Who copies between host and device: the copy engine or a kernel, by what this device was measured to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from kvstore.native import Arena, copy_to_device, copy_to_host

_SMALL_NBYTES, _MANY = 4096, 1024
_LARGE_NBYTES, _FEW = 16 << 20, 2
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class CopyCosts:
    """What copies of one direction take on one device.

    The engine starts a run while the one before is under way, so whichever is longer counts: submitting the runs, or
    their bytes. A kernel's time hardly depends on the number of runs.

    Args:
        engine_run_s: seconds of one more run.
        engine_byte_s: seconds of one more byte.
        kernel_start_s: seconds of a kernel that copies next to nothing.
        kernel_byte_s: seconds of one more byte.
    """

    engine_run_s: float
    engine_byte_s: float
    kernel_start_s: float
    kernel_byte_s: float

    def prefers_kernel(self, runs: int, nbytes: int) -> bool:
        """Say who is faster for `runs` copies of `nbytes` bytes in all."""
        engine_s = max(runs * self.engine_run_s, nbytes * self.engine_byte_s)
        return self.kernel_start_s + nbytes * self.kernel_byte_s < engine_s


@cache
def copy_costs(device_index: int, *, to_device: bool) -> CopyCosts:
    """Measure a CUDA device; takes some 50 ms and 64 MiB on both sides, once a process.

    Args:
        device_index: of the device.
        to_device: from host to device, or the other way.
    """
    device = torch.device("cuda", device_index)
    host = Arena(_LARGE_NBYTES * _FEW, True)
    memory = torch.empty(_LARGE_NBYTES * _FEW, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def copy(runs: list[tuple[int, int, int]], by_kernel: bool) -> None:
        place = (memory.data_ptr(), memory.nbytes)
        if to_device:
            copy_to_device(host, place, runs, by_kernel, stream.cuda_stream)
        else:
            copy_to_host(place, host, runs, by_kernel, stream.cuda_stream)

    # Apart on both sides, so that they are not joined.
    small = [(2 * at * _SMALL_NBYTES, 2 * at * _SMALL_NBYTES, _SMALL_NBYTES) for at in range(_MANY)]
    large = [(at * _LARGE_NBYTES, (_FEW - 1 - at) * _LARGE_NBYTES, _LARGE_NBYTES) for at in range(_FEW)]
    seconds = {
        (name, by_kernel): _seconds(lambda runs=runs, by_kernel=by_kernel: copy(runs, by_kernel), stream)  # type: ignore[misc]
        for name, runs in (("one", small[:1]), ("small", small), ("large", large))
        for by_kernel in (False, True)
    }
    large_nbytes = _FEW * _LARGE_NBYTES
    start_s = seconds["one", True]
    return CopyCosts(
        engine_run_s=seconds["small", False] / _MANY,
        engine_byte_s=seconds["large", False] / large_nbytes,
        kernel_start_s=start_s,
        kernel_byte_s=max(seconds["large", True] - start_s, 0.0) / large_nbytes,
    )


def _seconds(queue: Callable[[], None], stream: torch.cuda.Stream) -> float:
    times = []
    for _ in range(_ROUNDS + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record(stream)
        queue()
        ended.record(stream)
        ended.synchronize()
        times.append(float(began.elapsed_time(ended)) / 1000)
    return float(median(times[1:]))  # the first one warms up
