# SPDX-License-Identifier: Apache-2.0
"""The units of a stream's layers kept beside it in the store: a process that asks reads them instead of all keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import count, takewhile

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError
from kvstore.retrieval.index.choice import choose_index
from kvstore.retrieval.index.segment import SEGMENT_ROWS
from kvstore.retrieval.index.segmented import SegmentedIndex
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.memory_parts import load_units, pack_units
from kvstore.retrieval.policy import Policy
from kvstore.store import Entry, NewObject, Store

LEAST_TOKENS = 1024
"""A stream is kept anew once it has grown by so many tokens and by an eighth."""

_FORMAT = 1
_TAIL = 0


class _RoundedIndex(SegmentedIndex):
    """Rows in 16 bits before they are sealed, so that they are kept as they are compared."""

    def add(self, rows: Tensor) -> None:
        super().add(rows.to(torch.bfloat16).float())


def make_index(num_partitions: int, width: int) -> SegmentedIndex:
    """An index over units that are kept: see `choose_index`; rows are rounded to bfloat16."""
    like = choose_index(num_partitions, width).snapshot()
    return _RoundedIndex(num_partitions, width, like.coding)


class KeptViews:
    """Objects of one kind: number 0 holds the last units, the others whole segments of 1,024, which stay as they are.

    Each part of an object is one layer, but for the last: the key of the last block that it describes, which says all
    before it. What units are made from names the kind: segmenter, views and sinks.

    Args:
        store: the open store.
        name: of the stream.
        policy: it has views.
    """

    def __init__(self, store: Store, name: str, policy: Policy) -> None:
        self._store = store
        self._name = name
        self._made_by = f"{policy.segmenter};{policy.views};{policy.estimated_share > 0};{_FORMAT}"
        self._bounds: list[int] = [0]
        """Units before each object but the last; all layers alike."""

    def load(
        self, layers: Sequence[LayerMemory], num_sink_blocks: int, entries: Sequence[Entry], num_tokens: int
    ) -> int:
        """Put what is kept into empty memories.

        Args:
            layers: of all layers.
            num_sink_blocks: leading blocks that are left out.
            entries: of the stream; objects that describe more are passed over.
            num_tokens: of these entries.

        Returns:
            Blocks that the units were cut from; 0 where nothing is kept.

        Raises:
            CorruptRecordError, UnsupportedFormatError, ShapeError: an object is damaged, or not what it should be; the
                memories hold a part of it.
        """
        self._bounds, kind, known = [0], self._kind(num_sink_blocks), 0
        found = {
            each.index: each.num_blocks
            for each in self._store.objects(self._name, kind)
            if 0 < each.num_blocks <= len(entries) and len(each.part_nbytes) == len(layers) + 1
        }
        whole = list(takewhile(found.__contains__, count(_TAIL + 1)))
        for index in (*whole, *([_TAIL] if _TAIL in found else [])):
            parts = self._store.read_object(self._name, kind, index)
            if len(parts) != len(layers) + 1:
                raise CorruptRecordError(f"object {index} of {kind!r} is gone")
            if parts.pop() != entries[found[index] - 1].key:
                raise CorruptRecordError(f"object {index} of {kind!r} describes other blocks than were known")
            for layer, (memory, part) in enumerate(zip(layers, parts, strict=True)):
                if part is None:
                    raise CorruptRecordError(f"layer {layer} of object {index} of {kind!r} is damaged")
                load_units(memory, part, num_tokens)
            known = max(known, found[index])
            if index != _TAIL:
                self._bounds.append(layers[0].num_units)
        return known

    def keep(self, layers: Sequence[LayerMemory], num_sink_blocks: int, entries: Sequence[Entry]) -> None:
        """Store the units that are cut.

        Args:
            layers: of all layers; no block of theirs was lost.
            num_sink_blocks: leading blocks that were left out.
            entries: of the leading blocks that the units were cut from; durable or on their way; not empty.

        Raises:
            KVStoreError: what the store's writer ran into before.
        """
        kind, objects = self._kind(num_sink_blocks), []
        there = {each.index for each in self._store.objects(self._name, kind)}
        behind = range(_TAIL + 1, len(self._bounds))
        bounds = self._bounds[: 1 + sum(1 for _ in takewhile(there.__contains__, behind))]  # some found no room
        num_blocks, name = len(entries), entries[-1].key
        least = min(memory.num_units for memory in layers)
        for unit in range(bounds[-1] + SEGMENT_ROWS, least + 1, SEGMENT_ROWS):
            if all(memory.table.is_boundary(unit) for memory in layers):
                parts = [pack_units(memory, bounds[-1], unit) for memory in layers]
                objects.append(NewObject(kind, len(bounds), num_blocks, [*parts, name]))
                bounds.append(unit)
        tail = [pack_units(memory, bounds[-1], memory.num_units) for memory in layers]
        objects.append(NewObject(kind, _TAIL, num_blocks, [*tail, name]))
        self._store.put_objects(self._name, objects, may_drop=True)
        self._bounds = bounds

    def _kind(self, num_sink_blocks: int) -> str:
        text = f"{self._made_by};{num_sink_blocks}"
        return f"views:{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
