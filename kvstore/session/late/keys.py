# SPDX-License-Identifier: Apache-2.0
"""Keys of some layers of stored blocks, read without the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.store import Entry, FetchRequest, Store

_TOO_LARGE = 1e18
"""Above, the length of a key, or the mean of many, is no number in 32 bits."""


class BlockKeys:
    """Reads keys of a few layers.

    A block that cannot be read is left out, which is no error: `damaged` says why, by the block's index.

    Args:
        store: the open store.
        layout: of its slots.
        layers: which.
    """

    def __init__(self, store: Store, layout: BlockLayout, layers: Sequence[int]) -> None:
        self._store = store
        self._layout = layout
        self._layers = list(layers)
        self.damaged: dict[int, str] = {}

    def of(self, entries: Sequence[Entry], fresh: Mapping[int, Tensor]) -> list[tuple[Entry, Tensor | None]]:
        """Blocks with their keys, `[num_tokens, num_layers, kv_heads * key_dim]` float32; None for damaged ones.

        Args:
            entries: the blocks.
            fresh: slots, uint8, of blocks that need not be read because they have just been appended, by index.
        """
        stored = [entry for entry in entries if entry.index not in fresh]
        # Slots of whole blocks, of which only the pages of the wanted layers are ever touched.
        slots = torch.empty(len(stored), self._layout.slot_nbytes, dtype=torch.uint8)
        requests = [
            FetchRequest(entry.key, slot, range(layer, layer + 1))
            for entry, slot in zip(stored, slots, strict=True)
            for layer in self._layers
        ]
        report = self._store.fetch(requests) if requests else None
        places = {entry.index: number for number, entry in enumerate(stored)}
        found: list[tuple[Entry, Tensor | None]] = []
        for entry in entries:
            number = places.get(entry.index)
            reason = ""
            if number is not None and report is not None:
                first = number * len(self._layers)
                lost = [at for at in range(first, first + len(self._layers)) if not report.outcomes[at].is_hit]
                reason = report.reasons.get(lost[0], "the block is not stored") if lost else ""
            slot = fresh[entry.index] if number is None else slots[number]
            keys = self._layout.keys(slot)[self._layers, :, : entry.num_tokens].cpu()
            keys = keys.permute(2, 0, 1, 3).flatten(2).float()
            if not reason and not bool((keys.abs() < _TOO_LARGE).all()):
                reason = "its keys are not finite, or too large"
            if reason:
                self.damaged[entry.index] = reason
            found.append((entry, None if reason else keys))
        return found
