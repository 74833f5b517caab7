# SPDX-License-Identifier: Apache-2.0
"""Quotas of streams, and who is let into a tier."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvstore.config import Admission, Eviction
from kvstore.spec import BlockKey
from kvstore.tiers.eviction.admission import Doorkeeper
from kvstore.tiers.eviction.partitions import NOBODY, Partitions
from tests.store_blocks import block_key

KEYS = [block_key(number) for number in range(60)]


def _fill(parts: Partitions, capacity: int, asks: Sequence[tuple[str, BlockKey]]) -> dict[BlockKey, str]:
    """Enter blocks under a capacity; returns who is there, and whose."""
    held: dict[BlockKey, str] = {}
    for owner, key in asks:
        is_at_quota = parts.is_at_quota(owner, 0)
        if len(held) == capacity or is_at_quota:
            victim = parts.victim(owner if is_at_quota else None, lambda _: True)
            assert victim is not None
            parts.give_back(held.pop(victim))
        parts.take(owner)
        parts.add(key, owner)
        held[key] = owner
    return held


@pytest.mark.parametrize("eviction", Eviction)
def test_a_stream_at_its_quota_makes_room_itself(eviction: Eviction) -> None:
    asks = [("small", key) for key in KEYS[:3]] + [("large", key) for key in KEYS[10:40]]
    held = _fill(Partitions(eviction, 12, 6), 12, asks)
    assert [held.get(key) for key in KEYS[:3]] == ["small"] * 3
    assert list(held.values()).count("large") == 6


def test_a_stream_below_its_quota_takes_from_nobody_then_from_whoever_has_most() -> None:
    asks = [(NOBODY, key) for key in KEYS[:2]] + [("large", key) for key in KEYS[10:15]]
    parts = Partitions(Eviction.LRU, 8, 5)
    asks += [("small", key) for key in KEYS[20:24]]
    owners = sorted(_fill(parts, 8, asks).values())
    assert owners == ["large"] * 4 + ["small"] * 4


def test_without_a_quota_owners_do_not_matter() -> None:
    asks = [("a", KEYS[0]), ("b", KEYS[1]), ("a", KEYS[2])]
    assert list(_fill(Partitions(Eviction.LRU, 2, None), 2, asks)) == [KEYS[1], KEYS[2]]


def test_a_doorkeeper_lets_in_who_comes_twice() -> None:
    keeper = Doorkeeper(Admission.SECOND_USE, 2)
    assert [keeper.admits(KEYS[number]) for number in (0, 1, 0, 0, 1)] == [False, False, True, False, True]
    for key in KEYS[2:11]:
        keeper.admits(key)
    assert not keeper.admits(KEYS[0]), "remembered for eight others only"
    assert all(Doorkeeper(Admission.ALWAYS, 2).admits(key) for key in KEYS)
