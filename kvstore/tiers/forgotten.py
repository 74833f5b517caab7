# SPDX-License-Identifier: Apache-2.0
"""Blocks that were removed lately, so that a read that began before does not bring them back into memory."""

from __future__ import annotations

from collections import OrderedDict

from kvstore.spec import BlockKey

_NUM_REMEMBERED = 4096


class Forgotten:
    """Remembers the latest removals by number. Not thread-safe: the tier that asks holds its lock."""

    def __init__(self) -> None:
        self.num_noted = 0
        self._latest: OrderedDict[BlockKey, int] = OrderedDict()

    def note(self, key: BlockKey) -> None:
        """Note a removal."""
        self.num_noted += 1
        self._latest[key] = self.num_noted
        self._latest.move_to_end(key)
        if len(self._latest) > _NUM_REMEMBERED:
            self._latest.popitem(last=False)

    def may_have_since(self, key: BlockKey, num_noted: int) -> bool:
        """True when a block was removed after so many removals, or after more than are remembered."""
        return self.num_noted - num_noted > _NUM_REMEMBERED or self._latest.get(key, 0) > num_noted
