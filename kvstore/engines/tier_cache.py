# SPDX-License-Identifier: Apache-2.0
"""The cache object that a transformers model is given: it reports lengths and hands tokens to a stream or a branch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from kvstore.engines.linear_layers import LinearStates
from kvstore.errors import ConfigError, ShapeError
from kvstore.session.attention_inputs import AttentionInputs
from kvstore.session.branch import Branch
from kvstore.session.session import Session

_ROUNDING = 0.05


class TierLayer(CacheLayerMixin):
    """One layer's view of a `TierCache`: reports logical lengths, hands new keys and values through."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, owner: TierCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Not a circle: what a question holds, tens of megabytes, goes with its cache, not when the collector comes by.
        self._owner: TierCache = weakref.proxy(owner)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; nothing is allocated here."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # Library code may look at these; a view would keep the tensors of the forward alive.
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values: the attention function joins them with the past."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of the mask: it covers the tail of the running question, never the stored past."""
        sizes: tuple[int, int] = self._owner.mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        """Logical tokens so far: what the next position is counted from."""
        length: int = self._owner.num_tokens
        return length

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    get_max_cache_shape = get_max_length


class TierCache(Cache):
    """A transformers cache over a stream (tokens are appended to it) or over a branch (tokens are forgotten).

    Args:
        session: the stream.
        branch: the question; None appends to the stream.
        states: of the linear layers of a hybrid model, at the stream's end; a branch goes on with a copy.
    """

    def __init__(self, session: Session, branch: Branch | None, states: LinearStates | None = None) -> None:
        self.session = session
        self.branch = branch
        self.states = states if states is None or branch is None else states.copy()
        self.rope_deltas: Tensor | None = None
        linear: dict[int, LinearAttentionLayer] = {} if self.states is None else self.states.layers
        count = session.view.num_layers + len(linear)
        super().__init__(layers=[linear.get(layer) or TierLayer(self) for layer in range(count)])

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """Let the forward inside choose the branch's blocks, and leave nothing else behind; see `Branch.recalling`."""
        assert self.branch is not None, "a stream recalls nothing"
        with nullcontext() if self.states is None else self.states.kept(), self.branch.recalling():
            yield

    @property
    def num_tokens(self) -> int:
        """Logical length: the stream's tokens, or the question's."""
        if self.branch is None:
            return self.session.view.sequence_length
        return self.branch.first_token + self.branch.num_tokens

    def mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `TierLayer.get_mask_sizes`."""
        if self.branch is None:
            return query_length, self.session.view.sequence_length
        return self.branch.num_tokens + query_length, self.branch.first_token

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; 0 or negative, as transformers counts.

        Raises:
            ShapeError: a positive number, as transformers once counted.
            ConfigError: the model has linear layers, whose states cannot be cut.
        """
        if tokens_to_remove < 0 and self.states is not None:
            raise ConfigError("a model with linear layers cannot take tokens back: their states cannot be cut")
        if tokens_to_remove > 0:
            raise ShapeError(f"crop({tokens_to_remove}): give a negative number, of tokens to remove")
        if tokens_to_remove < 0:
            (self.branch or self.session).drop(-tokens_to_remove)

    def reset(self) -> None:
        """Forget the question; a stream cannot be reset, it is what is stored."""
        if self.branch is None:
            raise ConfigError("a stream's cache cannot be reset; start another stream or remove it from the store")
        self.branch.drop(self.branch.num_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences of a beam search."""
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._rows(torch.arange(self._batch()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._rows(indices)

    def prepare(self, tokens: Tensor) -> None:
        """Get ready for a forward: more than one sequence on a stream branches off it.

        Args:
            tokens: [batch, num_new] int64 ids, or [batch, num_new, hidden] embeddings.

        Raises:
            ShapeError: the forward is to choose blocks, and its sequences differ.
            ConfigError: several sequences for a model with linear layers.
        """
        if self.states is not None and tokens.shape[0] > 1:
            raise ConfigError(f"a batch of {tokens.shape[0]} sequences: a model with linear layers takes one at a time")
        branch = self._branch_for(tokens.shape[0])
        if branch is not None and branch.selects_next and not _are_alike(tokens):
            raise ShapeError(
                f"a batch of {tokens.shape[0]} sequences that differ would be answered from what suits the first; "
                "ask them one at a time, or choose the blocks before, with question(input_ids)"
            )
        self.branch = branch

    def _branch_for(self, batch: int) -> Branch | None:
        return self.session.branch(continues=True) if self.branch is None and batch > 1 else self.branch

    def _batch(self) -> int:
        return self.branch.batch if self.branch is not None else 1

    def _rows(self, rows: Tensor) -> None:
        if self.states is not None:
            raise ConfigError("a model with linear layers takes one sequence at a time, without beams")
        self.branch = self._branch_for(rows.numel())
        if self.branch is not None:
            self.branch.take_rows(rows)

    def extend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, ids: Tensor, scale: float
    ) -> AttentionInputs:
        """Append one layer of a forward to the branch or the stream.

        Args:
            layer: layer index; layer 0 comes first.
            query: [batch, num_heads, num_new, key_dim] before RoPE.
            keys: [batch, kv_heads, num_new, key_dim] before RoPE.
            values: [batch, kv_heads, num_new, value_dim].
            positions: [rows, batch or 1, num_new] int64.
            ids: [num_new] int64 content ids; a branch has no use for them.
            scale: multiplies the logits.
        """
        positions = positions.expand(-1, keys.shape[0], -1)
        if self.branch is not None:
            return self.branch.extend(layer, query, keys, values, positions)
        return self.session.extend(layer, query, keys, values, positions, ids, scale)


def _are_alike(tokens: Tensor) -> bool:
    """Whether all sequences hold the same tokens; embeddings may differ by rounding."""
    if tokens.dim() == 2 or tokens.shape[0] == 1:
        return torch.equal(tokens, tokens[:1].expand_as(tokens))
    first = tokens[:1].float()
    return bool(((tokens - first).norm(dim=-1) <= _ROUNDING * first.norm(dim=-1)).all())
