# SPDX-License-Identifier: Apache-2.0
"""Eviction decisions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.policy import Candidate, choose_victims, eviction_target
from kvstore.spec import BlockKey


def _candidates(count: int, nbytes: int = 100) -> list[Candidate]:
    return [Candidate(BlockKey(bytes([position]) * 32), nbytes) for position in range(count)]


@pytest.mark.parametrize(("target", "count"), [(-1, 0), (0, 0), (1, 1), (100, 1), (101, 2), (300, 3), (301, 3)])
def test_takes_the_oldest_until_the_target_is_reached(target: int, count: int) -> None:
    candidates = _candidates(3)
    assert choose_victims(candidates, target_nbytes=target, keep=()) == candidates[:count]


def test_never_takes_a_block_in_use() -> None:
    candidates = _candidates(3)
    assert choose_victims(candidates, target_nbytes=100, keep={candidates[0].key}) == [candidates[1]]


def test_reads_no_further_than_needed() -> None:
    def endless() -> Iterator[Candidate]:
        yield from _candidates(2)
        pytest.fail("read a third candidate")

    assert len(choose_victims(endless(), target_nbytes=200, keep=())) == 2


@pytest.mark.parametrize(("need", "used", "target"), [(10, 0, 10), (10, 64 * 11, 11), (64, 64, 64)])
def test_target_covers_the_need_and_a_share_of_the_tier(need: int, used: int, target: int) -> None:
    assert eviction_target(need, used) == target
