# SPDX-License-Identifier: Apache-2.0
"""A tier's blocks by owner: each with a policy of its own, and none above its quota."""

from __future__ import annotations

from collections import Counter

from kvstore.config import Eviction
from kvstore.spec import BlockKey
from kvstore.tiers.eviction.policy import LRU, EvictionPolicy, MayLeave
from kvstore.tiers.eviction.s3_fifo import S3FIFO
from kvstore.tiers.eviction.scores import FadingLFU, Participation

NOBODY = ""
"""Owner of blocks that belong to no stream; it has no quota."""


def make_policy(eviction: Eviction, capacity: int) -> EvictionPolicy:
    """Make an empty policy for a tier of `capacity` blocks."""
    match eviction:
        case Eviction.LRU:
            return LRU()
        case Eviction.S3_FIFO:
            return S3FIFO(capacity)
        case Eviction.LFU:
            return FadingLFU(capacity)
        case Eviction.PARTICIPATION:
            return Participation(capacity)


class Partitions:
    """Who leaves when an owner needs room. Not thread-safe.

    Without a quota all blocks are one partition. With one, an owner that has reached it makes room itself; another
    takes what belongs to nobody first, then from whoever has most.

    Args:
        eviction: the policy of every partition.
        capacity: blocks that the tier holds.
        quota: most blocks of one owner; None for no limit.
    """

    def __init__(self, eviction: Eviction, capacity: int, quota: int | None) -> None:
        self._eviction = eviction
        self._capacity = capacity
        self._quota = quota
        self._policies: dict[str, EvictionPolicy] = {}
        self._owners: dict[BlockKey, str] = {}
        self._counts: Counter[str] = Counter()

    @property
    def is_by_age(self) -> bool:
        """Whether the last to come stay, whatever was known of the others."""
        return self._eviction is Eviction.LRU

    def is_at_quota(self, owner: str, num_kept: int) -> bool:
        """True when an owner may have no more slots than it has; of those it must keep, half a quota counts."""
        if self._quota is None or owner == NOBODY:
            return False
        return self._counts[owner] - max(0, num_kept - self._quota // 2) >= self._quota

    def take(self, owner: str) -> None:
        """Count a slot that an owner fills."""
        self._counts[owner] += 1

    def give_back(self, owner: str) -> None:
        """Undo `take`: the slot is free, or goes to another owner."""
        self._counts[owner] -= 1
        if self._counts[owner] == 0 and owner != NOBODY and self._quota is not None:
            del self._counts[owner]
            self._policies.pop(owner, None)  # it knows no block any more

    def add(self, key: BlockKey, owner: str) -> None:
        """Note that a slot of an owner holds a block now."""
        self._owners[key] = owner
        self._policy(owner).add(key)

    def use(self, key: BlockKey) -> None:
        """See `EvictionPolicy`; does nothing to a block whose eviction was interrupted."""
        if key in self._owners:
            self._policy(self._owners[key]).use(key)

    def attend(self, key: BlockKey, mass: float) -> None:
        """See `use`."""
        if key in self._owners:
            self._policy(self._owners[key]).attend(key, mass)

    def remove(self, key: BlockKey) -> None:
        """See `use`."""
        if key in self._owners:
            self._policy(self._owners.pop(key)).remove(key)

    def victim(self, owner: str | None, may_leave: MayLeave) -> BlockKey | None:
        """Choose the block that makes room, and forget it; None when none may leave.

        Args:
            owner: who has to make room itself; None for whoever must.
            may_leave: says which blocks are in nobody's use.
        """
        if self._quota is None:
            tried = list(self._policies.values())
        elif owner is not None:
            tried = [self._policy(owner)]
        else:
            order = sorted(self._policies, key=lambda name: (name != NOBODY, -self._counts[name]))
            tried = [self._policies[name] for name in order]
        for policy in tried:
            key = policy.victim(may_leave)
            if key is not None:
                self._owners.pop(key, None)
                return key
        return None

    def _policy(self, owner: str) -> EvictionPolicy:
        name = NOBODY if self._quota is None else owner
        if name not in self._policies:
            capacity = self._capacity if self._quota is None or name == NOBODY else min(self._quota, self._capacity)
            self._policies[name] = make_policy(self._eviction, capacity)
        return self._policies[name]
