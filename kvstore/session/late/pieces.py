# SPDX-License-Identifier: Apache-2.0
"""Pieces of a late-interaction index in the store, as objects of their stream."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.retrieval.late.piece import PieceHead, pack_head, unpack_head
from kvstore.retrieval.late.rows import TokenRows, pack_rows
from kvstore.store import NewObject, Store
from kvstore.telemetry.fault_log import log_fault

_READ_AHEAD = 64


class LatePieces:
    """Reads and writes the pieces of one stream.

    Args:
        store: the open store.
        name: the stream.
        layers: compared layers; other layers are another index.
    """

    def __init__(self, store: Store, name: str, layers: Sequence[int]) -> None:
        self._store = store
        self._name = name
        self._kind = f"late-{'-'.join(map(str, layers))}"
        self._ahead: dict[int, bytes] = {}
        self._is_queued = False

    def head(self, number: int, num_parts: int, part_dim: int) -> PieceHead | None:
        """A piece's head; None if it is not stored, or damaged."""
        if number not in self._ahead:
            # A stored piece is mostly followed by others: an opened stream wants them all.
            numbers = range(number, number + _READ_AHEAD)
            found = self._store.read_objects(self._name, self._kind, [(each, [0]) for each in numbers])
            self._ahead = {each: parts[0] for each, parts in zip(numbers, found, strict=True) if parts[0] is not None}
        data = self._ahead.pop(number, None)
        if data is None:
            return None
        try:
            return unpack_head(data, num_parts, part_dim)
        except (CorruptRecordError, UnsupportedFormatError) as error:
            log_fault("piece of an index not used", stream=self._name, piece=number, reason=str(error))
            return None

    def rows(self, wanted: Sequence[tuple[int, Sequence[int]]]) -> list[list[bytes | None]]:
        """Rows of blocks, in one batch: (piece, numbers of the blocks in it) each; None for those that are damaged.

        Waits for what `put` has queued, and raises like `Store.flush` then.
        """
        if self._is_queued:
            self._store.flush()
            self._is_queued = False
        parts = [(piece, [1 + block for block in blocks]) for piece, blocks in wanted]
        return self._store.read_objects(self._name, self._kind, parts)

    def put(self, number: int, head: PieceHead, blocks: Sequence[TokenRows], words: Sequence[Tensor]) -> None:
        """Store a piece behind the blocks it describes; raises like `Store.put_objects`."""
        self._is_queued = True
        rows = [pack_rows(each, of_block) for each, of_block in zip(blocks, words, strict=True)]
        piece = NewObject(self._kind, number, head.end_block, [pack_head(head), *rows])
        self._store.put_objects(self._name, [piece], may_drop=True)
