# SPDX-License-Identifier: Apache-2.0
"""Who is let into a tier: everybody, or who comes for the second time."""

from __future__ import annotations

import threading
from collections import OrderedDict

from kvstore.config import Admission
from kvstore.spec import BlockKey

_MEMORY = 4
"""Keys remembered per block of the tier: a second use after more first ones than this is a first one again."""


class Doorkeeper:
    """Decides whether a block that was just used may take a slot. Thread-safe.

    Args:
        admission: the rule.
        capacity: blocks that the tier holds.
    """

    def __init__(self, admission: Admission, capacity: int) -> None:
        self._admission = admission
        self._num_remembered = _MEMORY * capacity
        self._lock = threading.Lock()
        self._seen: OrderedDict[BlockKey, None] = OrderedDict()

    @property
    def is_open(self) -> bool:
        """Whether everybody may enter."""
        return self._admission is Admission.ALWAYS

    def admits(self, key: BlockKey) -> bool:
        """Note a use and say whether the block may enter."""
        if self.is_open:
            return True
        with self._lock:
            if key in self._seen:
                del self._seen[key]
                return True
            self._seen[key] = None
            if len(self._seen) > self._num_remembered:
                self._seen.popitem(last=False)
            return False
