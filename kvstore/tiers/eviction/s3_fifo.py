# SPDX-License-Identifier: Apache-2.0
"""S3-FIFO: a small queue for newcomers, a main queue, and a memory of who was sent away too early."""

from __future__ import annotations

from collections import OrderedDict

from kvstore.spec import BlockKey
from kvstore.tiers.eviction.policy import MayLeave

SMALL_SHARE = 0.1
_MAX_USES = 3


class S3FIFO:
    """Three static FIFO queues (Yang et al., SOSP 2023, "FIFO queues are all you need for cache eviction").

    Newcomers wait in the small queue; who was used twice there goes to the main queue, the others leave, so a scan
    passes without touching the main queue. Who comes back while it is remembered enters the main queue at once.

    Args:
        capacity: blocks that the tier holds.
    """

    def __init__(self, capacity: int) -> None:
        self._small_size = max(1, int(SMALL_SHARE * capacity))
        self._ghost_size = max(1, capacity - self._small_size)
        self._small: OrderedDict[BlockKey, int] = OrderedDict()  # uses, oldest first
        self._main: OrderedDict[BlockKey, int] = OrderedDict()
        self._ghosts: OrderedDict[BlockKey, None] = OrderedDict()

    def add(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def use(self, key: BlockKey) -> None:
        """See `EvictionPolicy`; the order stays."""
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, _MAX_USES)

    def attend(self, key: BlockKey, mass: float) -> None:
        """Attention is no use: only who asks for a block matters."""

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy`."""
        del (self._small if key in self._small else self._main)[key]

    def victim(self, may_leave: MayLeave) -> BlockKey | None:
        """See `EvictionPolicy`."""
        held: set[BlockKey] = set()
        while len(held) < len(self._small) + len(self._main):
            # Small comes early when main has nothing else: who is held there would come round for ever.
            is_small = len(self._small) >= self._small_size or len(held) == len(self._main)
            queue = self._small if is_small else self._main
            key, uses = queue.popitem(last=False)
            if is_small and uses > 1:
                self._main[key] = 0
            elif not is_small and uses > 0:
                self._main[key] = uses - 1
            elif may_leave(key):
                if is_small:
                    self._remember(key)
                return key
            else:
                held.add(key)  # behind the others, in the main queue: a small one full of such would hide it
                self._main[key] = 0
        return None

    def _remember(self, key: BlockKey) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > self._ghost_size:
            self._ghosts.popitem(last=False)
