# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while slots of the host tier are leased and published: none is lost, and every block can be asked for."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.tiers.host import HostTier, Lease
from tests.interrupting import interrupt_at
from tests.store_blocks import LAYOUT, block_key

FILES = ("host.py", "lease.py", "partitions.py", "policy.py")
RELEASES = ("release_some", "_release", "_give_back")
KEYS = [block_key(number) for number in range(6)]


def _interrupt_at(number: int, call: Callable[[], object]) -> bool:
    """Interrupt a call where the tier calls a function, unless it gives back."""
    return interrupt_at(number, call, lambda at: at.co_filename.endswith(FILES) and at.co_name not in RELEASES)


def _fill(tier: HostTier, first: int) -> None:
    leases: list[Lease] = []
    try:
        tier.reserve_some([(key, "") for key in KEYS[first : first + 3]], leases)
        for lease in leases:
            lease.slot.fill_(KEYS.index(lease.key))
        tier.publish_some(leases)
    finally:
        tier.release_some(leases)


def _pin(tier: HostTier) -> None:
    leases: list[Lease | None] = []
    try:
        tier.pin_some(KEYS, leases)
        for lease in leases:
            assert lease is None or (lease.slot == KEYS.index(lease.key)).all(), "another block is in its slot"
    finally:
        tier.release_some([lease for lease in leases if lease is not None])


def _fill_and_pin(tier: HostTier) -> None:
    _fill(tier, 0)
    _pin(tier)


def test_an_interrupt_loses_no_slot_and_no_block() -> None:
    number, was_interrupted = 1, True
    while was_interrupted:
        tier = HostTier(LAYOUT, 4 * LAYOUT.slot_nbytes)
        was_interrupted = _interrupt_at(number, lambda tier=tier: _fill_and_pin(tier))  # type: ignore[misc]
        _pin(tier)
        _fill(tier, 0)
        assert tier.present(KEYS[:3]) == [True] * 3
        for key in KEYS[:3]:
            assert tier.forget_idle(key), "nobody holds it"
        leases = [tier.try_reserve(block_key(100 + each)) for each in range(4)]
        assert None not in leases, "no slot is lost"
        number += 1
    assert number > 30


def test_an_interrupted_eviction_leaves_every_block_to_be_asked_for() -> None:
    number, was_interrupted = 1, True
    while was_interrupted:
        tier = HostTier(LAYOUT, 4 * LAYOUT.slot_nbytes)
        _fill(tier, 0)
        was_interrupted = _interrupt_at(number, lambda tier=tier: _fill(tier, 3))  # type: ignore[misc]
        for first in (3, 0, 3):
            _pin(tier)
            _fill(tier, first)
        _pin(tier)
        for key in KEYS:
            assert tier.forget_idle(key) or not tier.contains(key)
        number += 1
    assert number > 15
