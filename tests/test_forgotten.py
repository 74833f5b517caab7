# SPDX-License-Identifier: Apache-2.0
"""Blocks removed lately, and blocks that memory alone holds."""

from __future__ import annotations

from pathlib import Path

from kvstore.store import Outcome
from kvstore.tiers.forgotten import Forgotten
from kvstore.tiers.host import HostTier
from tests.store_blocks import HEADER, LAYOUT, block_key, empty_slot, make_blocks, open_store


def test_a_removal_is_remembered_and_too_many_are_all_suspected() -> None:
    forgotten = Forgotten()
    forgotten.note(block_key(0))
    before = forgotten.num_noted
    assert not forgotten.may_have_since(block_key(0), before)
    forgotten.note(block_key(1))
    assert forgotten.may_have_since(block_key(1), before)
    assert not forgotten.may_have_since(block_key(2), before)
    for number in range(10, 10 + 4096):
        forgotten.note(block_key(number))
    assert forgotten.may_have_since(block_key(2), before)
    assert not forgotten.may_have_since(block_key(2), before + 1)


def test_a_block_forgotten_since_it_was_asked_for_is_not_found() -> None:
    tier = HostTier(LAYOUT, 4 * LAYOUT.slot_nbytes)
    for is_forgotten in (True, False):
        asked_at = tier.num_forgotten
        lease = tier.try_reserve(block_key(1))
        assert lease is not None
        if is_forgotten:
            tier.forget(block_key(1))
        lease.publish(asked_at=asked_at)
        lease.release()
        assert (tier.contains(block_key(1)), tier.num_used) == (not is_forgotten, int(not is_forgotten))
    tier.close()


def test_a_block_that_only_memory_holds_can_be_removed(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=8) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(2), {})
        store.flush()
        host = store._moving().host
        for number in (5, 6):  # as a read through a remote tier leaves them
            lease = host.try_reserve(block_key(number))
            assert lease is not None
            lease.publish()
            lease.release()
        in_use = host.pin(block_key(6))
        assert in_use is not None
        assert store.remove([block_key(number) for number in (0, 5, 6, 7)]) == [False, True, False, False]
        in_use.release()
        assert store.exists([block_key(number) for number in (0, 5, 6)]) == [True, False, True]
        assert store.get([block_key(0), block_key(5)], [empty_slot(), empty_slot()]) == [Outcome.HOST, Outcome.MISS]
        assert store.remove([block_key(6)]) == [True]


def test_what_waits_to_be_written_stays(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=8) as store:
        store.create_stream(HEADER)
        with store._disk.mutation:
            store.append("lecture", make_blocks(2), {})
            assert not store._moving().host.forget_idle(block_key(0))
        store.flush()
        assert store.remove([block_key(0), block_key(1)]) == [False, False]
        assert store.verify().is_clean
