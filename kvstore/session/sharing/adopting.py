# SPDX-License-Identifier: Apache-2.0
"""Takes over blocks that other streams hold of a text, as far as they can be read where a model goes on from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.layout import BlockLayout
from kvstore.session.appender import payload_of
from kvstore.session.state import KIND, find_state
from kvstore.session.view import SessionConfig
from kvstore.spec import BlockKey, chain_key
from kvstore.store import Entry, FetchRequest, Store, StreamHeader

_ID_NBYTES = 8


def adopt_prefix(store: Store, header: StreamHeader, config: SessionConfig, ids: Tensor) -> int:
    """Continue a stream by what is stored of coming tokens; see `Stream.adopt_prefix`.

    Sinks, window and state, which the next forward needs, are read at once, and blocks wait in memory then: what is
    adopted ends where one of them is damaged.

    Args:
        store: the block store.
        header: of the stream.
        config: see `SessionConfig`.
        ids: [num_tokens] int64.

    Returns:
        Tokens that were added.
    """
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ShapeError(f"ids are {list(ids.shape)} {ids.dtype}; give [num_tokens] int64")
    payload, namespace = payload_of(ids), header.namespace

    def key_of(parent: BlockKey | None, first: int, num_tokens: int) -> BlockKey | None:
        part = payload[_ID_NBYTES * first : _ID_NBYTES * (first + num_tokens)]
        return chain_key(parent, part, namespace) if len(part) == _ID_NBYTES * num_tokens else None

    added = store.adopt(header.name, key_of, KIND)
    before = store.manifest(header.name).num_tokens - added
    while added:
        manifest = store.manifest(header.name)
        end = max(_sound_end(store, header, config, manifest.entries, before), before)
        if end == manifest.num_tokens:
            break
        store.rollback(header.name, end, manifest.cursor)
        added = end - before
    return added


def _sound_end(store: Store, header: StreamHeader, config: SessionConfig, entries: Sequence[Entry], before: int) -> int:
    """Where a model can go on from, among what was added behind token `before`; a hybrid model only from a state."""
    needed = [entry for entry in _needed(entries, config, header) if entry.first_token >= before]
    damaged = next((entry for entry in needed if not _is_readable(store, header, entry)), None)
    sound = entries if damaged is None else entries[: damaged.index]
    if store.objects(header.name, KIND):
        state = find_state(store, header.name, sound)
        return 0 if state is None else state.num_tokens
    return max((entry.first_token + entry.num_tokens for entry in sound[-1:]), default=0)


def _needed(entries: Sequence[Entry], config: SessionConfig, header: StreamHeader) -> list[Entry]:
    """Sinks, and a window that is no smaller than the one that a session opens with."""
    sinks = [entry for entry in entries if entry.first_token < config.sink_tokens]
    left, first = config.window_tokens, len(entries)
    while first > len(sinks) and left > 0:
        first -= 1
        left -= max(entries[first].num_tokens, header.block_tokens // 4)
    return [*sinks, *entries[first:]]


def _is_readable(store: Store, header: StreamHeader, entry: Entry) -> bool:
    slot = torch.empty(BlockLayout(header.spec, header.block_tokens).slot_nbytes, dtype=torch.uint8)
    return store.fetch([FetchRequest(entry.key, slot, None, header.name)]).outcomes[0].is_hit
