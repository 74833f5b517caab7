# SPDX-License-Identifier: Apache-2.0
"""Indexes the keys of blocks while they are at hand: when they have just been appended."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.session.late.ranking import LateRanking
from kvstore.session.view import StreamView
from kvstore.store import NewBlock


def note_keys(view: StreamView, blocks: Sequence[NewBlock]) -> None:
    """Index blocks of a stream that a question will rank late, at once or once it is long: later none is read.

    Args:
        view: the stream, these blocks included.
        blocks: handed to the store, durable or not.

    Raises:
        CapacityError, StoreIOError: what the store's writer met since the last call.
    """
    for policy in (view.config.policy, view.config.policy.beyond):
        if policy is not None and policy.late is not None and view.rotate is not None:
            search = view.search(policy)
            assert isinstance(search, LateRanking), "its policy has no views"
            search.refresh(view.num_sink_blocks, view.entries, {block.entry.index: block.slot for block in blocks})
