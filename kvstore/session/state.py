# SPDX-License-Identifier: Apache-2.0
"""What a model keeps of a stream beside keys and values, such as the recurrent states of linear attention layers.

Such a state is a function of all tokens before it, and cannot be cut: it is saved at the end of a block, as an object
of the stream, and found again by whoever goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.store import Entry, NewObject, Store

KIND = "model-state"


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state, and the tokens of the stream's beginning that it stands for."""

    num_tokens: int
    parts: list[bytes]


def save_state(store: Store, name: str, last: Entry | None, parts: Sequence[bytes | memoryview]) -> None:
    """Queue the state behind a stream's block; raises like `Store.put_objects`.

    Args:
        store: the open store.
        name: of the stream.
        last: entry of the block; None for the state of an empty stream.
        parts: the state.
    """
    num_blocks = 0 if last is None else last.index + 1
    store.put_objects(name, [NewObject(KIND, num_blocks, num_blocks, [_name_of(last), *parts])])


def find_state(store: Store, name: str, entries: Sequence[Entry]) -> SavedState | None:
    """Return the newest state that can be read and that stands for no more than these entries; None for none.

    A state behind other blocks, of a stream that was rolled back and went on since it was looked at, is none of theirs.

    Args:
        store: the open store.
        name: of the stream.
        entries: the stream's, from the first one on.

    Raises:
        StreamNotFoundError: there is no such stream.
    """
    for each in reversed(store.objects(name, KIND)):
        if each.num_blocks > len(entries):
            continue
        last = entries[each.num_blocks - 1] if each.num_blocks else None
        parts = [part for part in store.read_object(name, KIND, each.index) if part is not None]
        if len(parts) == len(each.part_nbytes) and parts[0] == _name_of(last):
            return SavedState(0 if last is None else last.first_token + last.num_tokens, parts[1:])
    return None


def _name_of(last: Entry | None) -> bytes:
    """What names all tokens that a state stands for: the key of their last block says all that came before."""
    return b"" if last is None else last.key
