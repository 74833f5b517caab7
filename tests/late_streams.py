# SPDX-License-Identifier: Apache-2.0
"""A stream of a tiny model whose index is in several pieces: what the tests of late interaction ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from kvstore.engines.anatomy import spec_of
from kvstore.layout import BlockLayout
from kvstore.retrieval.maxsim import LateInteraction
from kvstore.retrieval.selection import Ranking
from kvstore.session.late.keys import BlockKeys
from kvstore.session.late.ranking import LateRanking
from kvstore.store import Access, Durability, Entries, Profile, Store
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

KIND = "late-0-1"
RULE = LateInteraction(hits_per_token=12, piece_tokens=8 * BLOCK_TOKENS, num_candidates=6)
CONFIG = settings(policy(late=RULE), window=16, sinks=4, budget=24)
STREAM = token_ids(44 * BLOCK_TOKENS)
"""A block of sinks, five pieces of eight blocks, and three blocks behind them."""


def append(path: Path, ids: Tensor) -> None:
    """Append to the stream in a session of its own."""
    model = make_model()
    with attached_stream(path, model, CONFIG) as attached:
        for part in ids.split(4 * BLOCK_TOKENS, dim=1):
            model(part)
        attached.session.commit(partial=True)
        attached.session.flush()


@contextmanager
def opened(path: Path, access: Access = Access.READ) -> Iterator[Store]:
    """The store."""
    layout = BlockLayout(spec_of(make_model()), BLOCK_TOKENS)
    with Store.open(
        path, access=access, layout=layout, profile=Profile.LOSSLESS, host_nbytes=4 << 20, durability=Durability.NONE
    ) as store:
        yield store


def entries_of(store: Store, name: str = "s") -> Entries:
    """All of a stream's."""
    return Entries.of(store.manifest(name).entries)


def late(store: Store, rule: LateInteraction = RULE, name: str = "s") -> LateRanking:
    """A ranking of the whole stream."""
    ranking = LateRanking(store, store.manifest(name).header, rule)
    ranking.refresh(1, entries_of(store, name))
    return ranking


def keys_of(store: Store, block: int) -> Tensor:
    """Keys of a block in the compared layers."""
    entries = entries_of(store)
    layers = RULE.layers(store.manifest("s").header.spec.num_layers)
    layout = BlockLayout(store.manifest("s").header.spec, BLOCK_TOKENS)
    ((_, keys),) = BlockKeys(store, layout, layers).of([entries[block]], {})
    assert keys is not None
    return keys


def same(one: Ranking, other: Ranking) -> bool:
    """Whether two rankings say the same."""
    return torch.equal(one.blocks, other.blocks) and torch.equal(one.scores, other.scores)
