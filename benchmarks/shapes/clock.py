# SPDX-License-Identifier: Apache-2.0
"""Time of calls on a device, and the limit that its memory sets: bytes over bandwidth, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from harness import MIN_ITERATIONS, WARM_UPS, Timing, alternate

_CPU_NBYTES, _CUDA_NBYTES = 256 << 20, 2 << 30


def timed(calls: Mapping[str, Callable[[], object]], device: torch.device, min_s: float) -> dict[str, Timing]:
    """Time calls in turns: wall time on the CPU; between two events on a GPU, launching included."""
    if device.type == "cpu":
        return alternate(calls, min_s=min_s)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UPS):
            call()
    torch.cuda.synchronize(device)
    stream, began = torch.cuda.current_stream(device), time.perf_counter()
    while min(map(len, samples.values())) < MIN_ITERATIONS or time.perf_counter() - began < min_s * len(calls):
        for name, call in calls.items():
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record(stream)
            call()
            last.record(stream)
            last.synchronize()
            samples[name].append(first.elapsed_time(last) / 1e3)
    return {name: Timing.of(times) for name, times in samples.items()}


class Bandwidth:
    """How fast a device reads and writes its memory: a copy of a buffer beyond its caches, both ways counted."""

    def __init__(self, device: torch.device, min_s: float) -> None:
        nbytes = _CPU_NBYTES if device.type == "cpu" else _CUDA_NBYTES
        source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        self._nbytes = 2 * nbytes
        self._copy = timed({"copy": lambda: target.copy_(source)}, device, min_s)["copy"]

    @property
    def nbytes_s(self) -> float:
        """Bytes a second."""
        return self._nbytes / self._copy.median_s

    def limit(self, nbytes: int) -> Timing:
        """Time that so many bytes take at that rate."""
        share = nbytes / self._nbytes
        copy = self._copy
        return Timing(copy.median_s * share, copy.p10_s * share, copy.p90_s * share, copy.iterations)
