# SPDX-License-Identifier: Apache-2.0
"""Joins a policy to one stream: makes the summaries that are stored, and searches the ones that were."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.retrieval.faiss_index import make_index
from kvstore.retrieval.maxsim import MaxSimScorer, scored_layers
from kvstore.retrieval.mean_query import MeanQueryScorer
from kvstore.retrieval.policies import Policy, Scope
from kvstore.retrieval.selection import Ranking
from kvstore.retrieval.summary import (
    Summary,
    SummaryKind,
    expand_token_keys,
    mean_keys,
    received_keys,
    token_keys,
)
from kvstore.spec import ModelSpec
from kvstore.store import Store

_BATCH = 64
_SAMPLE = 64


class Summariser:
    """Makes a block's stored summary: everything that any policy may ask for later.

    Args:
        spec: the model's KV geometry.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._layers = list(scored_layers(spec.num_layers))

    def __call__(self, keys: Tensor, positions: Tensor, received: Tensor) -> bytes:
        """Summarise a block.

        Args:
            keys: [num_layers, kv_heads, num_tokens, key_dim] pre-RoPE keys, any device.
            positions: [rows, num_tokens] int64 RoPE positions.
            received: [num_layers, kv_heads, num_tokens] float32 attention mass.
        """
        keys = keys.cpu()
        codes, scales = token_keys(keys[self._layers])
        parts = {
            SummaryKind.MEAN_KEY: mean_keys(keys),
            SummaryKind.RECEIVED_KEY: received_keys(keys, received),
            SummaryKind.TOKEN_KEY: codes,
            SummaryKind.TOKEN_SCALE: scales,
        }
        first = int(positions[0, 0])
        if positions.shape[0] > 1 or not torch.equal(positions[0], torch.arange(first, first + positions.shape[1])):
            parts[SummaryKind.POSITION] = positions.to(torch.int32)
        return Summary(parts).to_bytes()


class Retriever:
    """Searches one stream's summaries under one policy; the index is built on first use and extended later.

    A damaged summary makes its block unfindable, not an error: `num_damaged` counts them.

    Args:
        store: the open store.
        name: the stream.
        spec: the stream's spec.
        policy: what to search by.
    """

    def __init__(self, store: Store, name: str, spec: ModelSpec, policy: Policy) -> None:
        self._store = store
        self._name = name
        self._spec = spec
        self._policy = policy
        self._known = 0
        self._maxsim: MaxSimScorer | None = None
        self._by_layer: list[MeanQueryScorer] = []
        self.num_damaged = 0

    def refresh(self, num_sink_blocks: int, num_blocks: int) -> None:
        """Index the stream's blocks that are not indexed yet.

        Args:
            num_sink_blocks: leading blocks to leave out: they are attended always.
            num_blocks: where to stop.
        """
        self._known = max(self._known, num_sink_blocks)
        while self._policy.summary is not None and self._known < num_blocks:
            count = min(_BATCH, num_blocks - self._known)
            if self._policy.scope is Scope.STREAM and self._maxsim is None:
                self._maxsim = MaxSimScorer(make_index(self._row_dim()), self._mean_token_key(num_blocks))
            self._add(self._read(self._known, count))
            self._known += count

    def rank_stream(self, question: Tensor, num_blocks: int) -> Ranking:
        """Rank the blocks for all layers at once.

        Args:
            question: [num_tokens, num_parts, kv_heads * key_dim] float32 pre-RoPE keys of the question in the layers
                that `scored_layers` names.
            num_blocks: blocks of the stream.
        """
        if self._maxsim is None:
            return Ranking(torch.empty(0, dtype=torch.int64), torch.empty(0))
        return self._maxsim.rank(question, self._known).before(num_blocks)

    def rank_layer(self, layer: int, queries: Tensor, num_blocks: int) -> Ranking:
        """Rank the first `num_blocks` blocks for a layer: queries `[kv_heads, group, num_tokens, key_dim]` pre-RoPE."""
        if not self._by_layer:
            return Ranking(torch.empty(0, dtype=torch.int64), torch.empty(0))
        return self._by_layer[layer].rank(queries, self._known).before(num_blocks)

    def _row_dim(self) -> int:
        return len(scored_layers(self._spec.num_layers)) * self._spec.kv_heads * self._spec.key_dim

    def _read(self, first: int, count: int) -> list[tuple[int, Summary]]:
        found = []
        for offset, data in enumerate(self._store.summaries(self._name, first, count)):
            try:
                summary = Summary.from_bytes(data)
                self._check(summary)
                found.append((first + offset, summary))
            except CorruptRecordError:
                self.num_damaged += 1
        return found

    def _check(self, summary: Summary) -> None:
        assert self._policy.summary is not None
        part = summary.parts.get(self._policy.summary)
        if part is None:
            raise ConfigError(
                f"stream {self._name!r} was stored without {self._policy.summary.name} summaries, which policy "
                f"{self._policy.name} needs; ingest it again"
            )
        scales = summary.parts.get(SummaryKind.TOKEN_SCALE)
        if self._policy.summary is SummaryKind.TOKEN_KEY:
            num_parts = len(scored_layers(self._spec.num_layers))
            fits = part.shape[1] == self._row_dim() and scales is not None and scales.shape == (len(part), num_parts)
        else:
            fits = part.shape == (self._spec.num_layers, self._spec.kv_heads * self._spec.key_dim)
        if not fits or not part.isfinite().all() or (scales is not None and not scales.isfinite().all()):
            raise CorruptRecordError(f"summary of stream {self._name!r} does not fit its model")

    def _add(self, blocks: list[tuple[int, Summary]]) -> None:
        if self._maxsim is not None:
            self._maxsim.add_many((block, _tokens(summary)) for block, summary in blocks)
        elif blocks:
            assert self._policy.summary is not None
            if not self._by_layer:
                dim = self._spec.kv_heads * self._spec.key_dim
                self._by_layer = [MeanQueryScorer(make_index(dim)) for _ in range(self._spec.num_layers)]
            vectors = torch.stack([summary.parts[self._policy.summary] for _, summary in blocks]).float()
            for layer, scorer in enumerate(self._by_layer):
                scorer.add([block for block, _ in blocks], vectors[:, layer])

    def _mean_token_key(self, num_blocks: int) -> Tensor:
        stride = max((num_blocks - self._known) // _SAMPLE, 1)
        sample = [
            _tokens(summary) for block in range(self._known, num_blocks, stride) for _, summary in self._read(block, 1)
        ]
        self.num_damaged = 0  # counted again when the blocks are added
        if not sample:
            return torch.zeros(len(scored_layers(self._spec.num_layers)), self._spec.kv_heads * self._spec.key_dim)
        return torch.cat(sample).mean(dim=0)


def _tokens(summary: Summary) -> Tensor:
    return expand_token_keys(summary.parts[SummaryKind.TOKEN_KEY], summary.parts[SummaryKind.TOKEN_SCALE])
