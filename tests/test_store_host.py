# SPDX-License-Identifier: Apache-2.0
"""The host tier: who is evicted, who never is, and how producers wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvstore.config import Eviction, HostConfig
from kvstore.errors import StoreIOError
from kvstore.tiers.host import HostTier, Lease
from tests.store_blocks import LAYOUT, block_key


@pytest.fixture
def host() -> Iterator[HostTier]:
    tier = HostTier(LAYOUT, 2 * LAYOUT.slot_nbytes + 1)
    yield tier
    tier.close()


def _add(host: HostTier, number: int) -> Lease:
    lease = host.try_reserve(block_key(number))
    assert lease is not None
    lease.slot.fill_(number)
    lease.publish()
    return lease


def _held(host: HostTier) -> list[int]:
    return [number for number in range(1, 6) if host.contains(block_key(number))]


def test_the_least_recently_used_block_makes_room(host: HostTier) -> None:
    for number in (1, 2):
        _add(host, number).release()
    lease = host.pin(block_key(1))
    assert lease is not None
    lease.release()
    _add(host, 3).release()
    assert (_held(host), host.num_evicted) == ([1, 3], 1)


def test_a_leased_block_is_never_evicted(host: HostTier) -> None:
    _add(host, 1).release()
    lease = host.pin(block_key(1))
    assert lease is not None
    for number in (2, 3, 4):
        _add(host, number).release()
    assert _held(host) == [1, 4]
    assert (lease.slot == 1).all()
    lease.release()


def test_there_is_no_slot_while_all_are_leased(host: HostTier) -> None:
    leases = [_add(host, number) for number in (1, 2)]
    assert host.try_reserve(block_key(3)) is None
    leases[0].release()
    _add(host, 3).release()
    assert _held(host) == [2, 3]
    leases[1].release()


def test_a_block_is_not_found_before_it_is_complete(host: HostTier) -> None:
    lease = host.try_reserve(block_key(1))
    assert lease is not None
    assert host.pin(block_key(1)) is None
    lease.release()
    assert (_held(host), host.num_used) == ([], 0)


def test_a_block_brought_twice_is_held_once(host: HostTier) -> None:
    first, second = _add(host, 1), _add(host, 1)
    assert host.num_used == 2
    second.release()
    first.release()
    assert (host.num_used, _held(host)) == (1, [1])


def test_a_forgotten_block_keeps_its_slot_until_the_last_lease_ends(host: HostTier) -> None:
    lease = _add(host, 1)
    host.forget(block_key(1))
    assert (_held(host), host.num_used) == ([], 1)
    assert (lease.slot == 1).all()
    lease.release()
    assert host.num_used == 0
    host.forget(block_key(1))


def test_releasing_twice_is_noticed(host: HostTier) -> None:
    lease = _add(host, 1)
    lease.release()
    with pytest.raises(AssertionError, match="twice"):
        lease.release()


@pytest.mark.parametrize("num_slots", [8, 100])
def test_a_stream_whose_quota_is_full_of_kept_blocks_goes_on(num_slots: int) -> None:
    tier = HostTier(LAYOUT, num_slots * LAYOUT.slot_nbytes, HostConfig(stream_nbytes=4 * LAYOUT.slot_nbytes))
    tier.keep(block_key(number) for number in range(4))
    for number in range(40):
        lease = tier.reserve_within(block_key(number), lambda: 0.0, "lecture")
        assert lease is not None
        lease.publish()
        lease.release()
    assert [tier.contains(block_key(number)) for number in range(4)] == [True] * 4
    assert tier.num_used == 6, "four that are kept, of which half a quota counts, and two others"
    tier.unkeep(block_key(number) for number in range(4))
    for number in range(40, 44):
        lease = tier.try_reserve(block_key(number), "lecture")
        assert lease is not None
        lease.publish()
        lease.release()
    assert not any(tier.contains(block_key(number)) for number in range(4))
    tier.close()


def test_a_producer_waits_for_a_slot_and_gets_it(host: HostTier) -> None:
    leases = [_add(host, number) for number in (1, 2)]
    is_waiting = threading.Event()

    def check() -> None:
        # The second check follows a wait: until then the producer has not got a slot.
        if is_waiting.is_set():
            return
        is_waiting.set()

    got: list[Lease] = []
    producer = threading.Thread(target=lambda: got.append(host.reserve(block_key(3), check)))
    producer.start()
    assert is_waiting.wait(10)
    assert not got
    leases[1].release()
    producer.join(10)
    assert (got[0].slot_idx, _held(host)) == (leases[1].slot_idx, [1])
    got[0].release()
    leases[0].release()


def test_a_waiting_producer_learns_of_an_error(host: HostTier) -> None:
    leases = [_add(host, number) for number in (1, 2)]
    has_failed, is_waiting = threading.Event(), threading.Event()
    caught: list[StoreIOError] = []

    def check() -> None:
        if has_failed.is_set():
            raise StoreIOError("the disk is gone")
        is_waiting.set()

    def produce() -> None:
        try:
            host.reserve(block_key(3), check)
        except StoreIOError as error:
            caught.append(error)

    producer = threading.Thread(target=produce)
    producer.start()
    assert is_waiting.wait(10)
    has_failed.set()
    host.wake()
    producer.join(10)
    assert len(caught) == 1
    for lease in leases:
        lease.release()


def test_of_many_the_last_ones_get_slots_and_those_that_are_kept() -> None:
    tier = HostTier(LAYOUT, 4 * LAYOUT.slot_nbytes)
    tier.keep([block_key(1)])
    wanted = [(block_key(number), "") for number in range(1, 8)]

    assert tier.may_stay(wanted) == [True, False, False, True, True, True, True]
    leases: list[Lease] = []
    tier.reserve_some(wanted, leases)

    assert [lease.key for lease in leases] == [block_key(number) for number in (5, 6, 7, 1)]
    tier.publish_some(leases, asked_at=tier.num_forgotten)
    more: list[Lease] = []
    tier.reserve_some(wanted[3:], more)
    assert more == [], "all are leased, and three are here"
    tier.release_some(leases)
    pinned: list[Lease | None] = []
    tier.pin_some([block_key(number) for number in range(1, 8)], pinned)
    assert [lease is not None for lease in pinned] == [True, False, False, False, True, True, True]
    tier.release_some(lease for lease in pinned if lease is not None)
    assert tier.num_used == 4
    tier.close()


@pytest.mark.parametrize("eviction", [each for each in Eviction if each is not Eviction.LRU])
def test_policies_that_know_blocks_from_before_are_asked_about_each(eviction: Eviction) -> None:
    tier = HostTier(LAYOUT, 2 * LAYOUT.slot_nbytes, HostConfig(eviction))
    assert tier.may_stay([(block_key(number), "") for number in range(9)]) == [True] * 9
    tier.close()
