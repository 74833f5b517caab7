# SPDX-License-Identifier: Apache-2.0
"""Timing in alternating rounds, each call with its own preparation: what is cold for one is not for another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from harness import Timing, wall


def nothing() -> None:
    """No preparation."""


@dataclass(frozen=True, slots=True)
class Call:
    """What is timed, and what is done before it, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing


def rounds(calls: Mapping[str, Call], *, least: int, most_s: float) -> dict[str, Timing]:
    """Time calls in turns.

    Args:
        calls: by name; each is run once to warm up.
        least: rounds at least.
        most_s: after these seconds no further round begins.

    Returns:
        Medians and deciles by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call.prepare()
        call.run()
    began = wall()
    number = 0
    while number < least or (wall() - began < most_s and number < 10 * least):
        for name, call in calls.items():
            call.prepare()
            start = wall()
            call.run()
            samples[name].append(wall() - start)
        number += 1
    return {name: Timing.of(times) for name, times in samples.items()}
