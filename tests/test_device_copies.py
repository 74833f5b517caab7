# SPDX-License-Identifier: Apache-2.0
"""Who copies: what is decided from measured costs. What carries it out is tested where there is a device."""

from __future__ import annotations

from kvstore.tiers.device.copies import CopyCosts

# As peers report an H100's: half a microsecond a run, 55 GB/s, a kernel that reaches 50.
H100 = CopyCosts(engine_run_s=0.5e-6, engine_byte_s=1 / 55e9, kernel_start_s=8e-6, kernel_byte_s=1 / 50e9)


def test_many_small_runs_go_to_the_kernel_and_large_ones_to_the_engine() -> None:
    assert H100.prefers_kernel(10_000, 10_000 * 4096)
    assert not H100.prefers_kernel(10_000, 10_000 * 65536)
    assert not H100.prefers_kernel(1, 64 << 20)


def test_a_few_runs_are_over_before_a_kernel_has_started() -> None:
    assert not H100.prefers_kernel(10, 10 * 4096)


def test_a_slow_kernel_is_never_chosen() -> None:
    slow = CopyCosts(engine_run_s=1e-6, engine_byte_s=1e-11, kernel_start_s=1.0, kernel_byte_s=1e-11)
    assert not any(slow.prefers_kernel(runs, 4096 * runs) for runs in (1, 100, 10_000))
