# SPDX-License-Identifier: Apache-2.0
"""What a model keeps of a stream beside keys and values, such as the recurrent states of linear attention layers.

Such a state is a function of all tokens before it, and cannot be cut: it is saved at the end of a block, as an object
of the stream, and found again by whoever goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.store import NewObject, Store

KIND = "model-state"


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state, and the tokens of the stream's beginning that it stands for."""

    num_tokens: int
    parts: list[bytes]


def save_state(store: Store, name: str, num_blocks: int, parts: Sequence[bytes | memoryview]) -> None:
    """Queue the state behind `num_blocks` blocks of a stream; raises like `Store.put_objects`."""
    store.put_objects(name, [NewObject(KIND, num_blocks, num_blocks, parts)])


def find_state(store: Store, name: str) -> SavedState | None:
    """Return the newest state that can be read and that stands for no more than the stream holds; None for none.

    Raises:
        StreamNotFoundError: there is no such stream.
    """
    saved = store.objects(name, KIND)
    entries = store.manifest(name).entries
    for each in reversed(saved):
        if each.num_blocks > len(entries):
            continue  # the stream was cut, and went on, meanwhile
        parts = [part for part in store.read_object(name, KIND, each.index) if part is not None]
        if len(parts) == len(each.part_nbytes):
            return SavedState(sum(entry.num_tokens for entry in entries[: each.num_blocks]), parts)
    return None
