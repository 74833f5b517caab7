# SPDX-License-Identifier: Apache-2.0
"""The interface of all eviction policies, and plain LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeAlias

from kvstore.spec import BlockKey

MayLeave: TypeAlias = Callable[[BlockKey], bool]


class EvictionPolicy(Protocol):
    """Orders the blocks of a tier. Not thread-safe: the tier that asks holds its lock.

    A block that may not leave when it is its turn is in use, and treated as used just now.
    """

    def add(self, key: BlockKey) -> None:
        """Note that a block, new to the policy, has entered the tier."""
        ...

    def use(self, key: BlockKey) -> None:
        """Note that somebody asked for a block of the tier."""
        ...

    def attend(self, key: BlockKey, mass: float) -> None:
        """Note how much of a question's attention a block got; not every policy minds."""
        ...

    def remove(self, key: BlockKey) -> None:
        """Note that a block has left for another reason."""
        ...

    def victim(self, may_leave: MayLeave) -> BlockKey | None:
        """Choose the block that leaves and forget it; None when none may."""
        ...


class LRU:
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlockKey, None] = OrderedDict()

    def add(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        self._order[key] = None

    def use(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        self._order.move_to_end(key)

    def attend(self, key: BlockKey, mass: float) -> None:
        """Attention is no use: only who asks for a block matters."""

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        del self._order[key]

    def victim(self, may_leave: MayLeave) -> BlockKey | None:
        """See `EvictionPolicy`."""
        for _ in range(len(self._order)):
            key = next(iter(self._order))
            if may_leave(key):
                del self._order[key]
                return key
            self._order.move_to_end(key)
        return None
