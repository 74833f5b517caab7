# SPDX-License-Identifier: Apache-2.0
"""One growing sequence in a store, as users see it: attached, attended to, asked, forked, rolled back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.fusion import ExtraScores
from kvstore.retrieval.tokens import Rotate
from kvstore.session.branch import Branch
from kvstore.session.recall import Recall
from kvstore.session.session import Session
from kvstore.session.sharing.adopting import adopt_prefix
from kvstore.session.state import SavedState, find_state
from kvstore.session.view import SessionConfig
from kvstore.store import Store
from kvstore.tiers.manifest import StreamHeader


class Stream:
    """One growing sequence in a store. Attach it to a transformers model with `attach`, or call `attend` yourself.

    Args:
        store: the block store.
        header: what is fixed about the stream.
        config: see `SessionConfig`.
    """

    def __init__(self, store: Store, header: StreamHeader, config: SessionConfig) -> None:
        self._store = store
        self._header = header
        self._config = config
        self._session: Session | None = None
        self._branch: Branch | None = None
        self._recalled: Branch | None = None
        self.is_attached = False
        self.last = Recall()

    def bind(self, rotate: Rotate | None, device: torch.device, rows: int = 1, trained_tokens: int = 0) -> Session:
        """Give the stream its rotary function and device; once per process.

        Args:
            rotate: `(vectors [batch, heads, tokens, dim], positions [rows, batch, tokens]) -> vectors`; None where keys
                and queries arrive rotated.
            device: where attention runs.
            rows: rows of a position: 1, or 3 for M-RoPE.
            trained_tokens: positions that the model was trained for; 0 when that is not known.
        """
        if self._session is None:
            config = replace(self._config, trained_tokens=trained_tokens)
            self._session = Session(self._store, self._header, config, rotate, device, rows)
        return self._session

    @torch.inference_mode(False)
    @torch.no_grad()
    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, ids: Tensor, scale: float
    ) -> Tensor:
        """Attend from inside your own attention layer: append to the stream, or ask, under `asking`.

        Call it once per layer and forward, in order of layers. No gradient flows through it.

        Args:
            layer: layer index.
            query: [batch, num_heads, num_new, key_dim] before RoPE (after it for a stream bound without `rotate`).
            keys: [batch, kv_heads, num_new, key_dim], likewise.
            values: [batch, kv_heads, num_new, value_dim].
            positions: [rows, batch, num_new] int64; of a question, counted from its first token.
            ids: [num_new] int64 token ids of the first sequence: they name the blocks.
            scale: multiplies the logits.

        Returns:
            [batch, num_heads, num_new, value_dim].

        Raises:
            ConfigError: the stream is not bound yet.
            ShapeError: a layer out of turn, tensors that do not fit the model, or positions that do not continue the
                stream.
            StoreIOError: an earlier append failed; open the stream again.
        """
        session = self._bound()
        if self._branch is not None:
            inputs = self._branch.extend(layer, query, keys, values, positions)
        else:
            inputs = session.extend(layer, query, keys, values, positions, ids, scale)
        return inputs.attend(inputs.mask(None), scale)

    @contextmanager
    def recalling(self, external: Sequence[ExtraScores] = ()) -> Iterator[None]:
        """Start a question: the forward inside selects the blocks that `asking` will attend to.

        Args:
            external: what retrievers of your own think of the stream's blocks, one score for each: see
                `ExternalVectors`. They are fused by rank with the policy's own scores.

        Raises:
            ShapeError: not one external score for each block.
        """
        self._recalled = None
        branch = self._bound().branch(external=external)
        try:
            with branch.recalling():
                self._branch = branch
                yield
        finally:
            self._branch = None
        self._recalled, self.last = branch, branch.recall

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Answer: forwards inside attend to what `recalling` selected, and leave nothing in the stream."""
        if self._recalled is None:
            raise ConfigError("nothing was recalled yet; run the question under recalling() first")
        self._branch = self._recalled
        try:
            yield
        finally:
            self._branch = None

    def commit(self) -> None:
        """Store what has been appended, the last, unfinished block too; returns when it is durable."""
        if self._session is not None:
            self._session.commit(partial=True)
            self._session.flush()

    def save_state(self, parts: Sequence[bytes | memoryview]) -> None:
        """Store what the model keeps of the stream beside keys and values, such as recurrent states, as it is now.

        Closes the last, unfinished block; returns when the state is durable. A rollback below drops it, a fork from
        here on has it.

        Args:
            parts: the state, 1 GiB at most; what was saved at this place before goes.

        Raises:
            ConfigError: the stream is not bound, or more parts or bytes than an object may have.
            StoreIOError, CapacityError: the store cannot be written.
        """
        session = self._bound()
        session.save_state(parts)
        session.flush()

    def state(self) -> SavedState | None:
        """Return the newest state that was saved of what the stream holds, and the tokens it stands for; None for none.

        Raises:
            StreamNotFoundError: the stream was removed.
        """
        if self._store.is_writable:
            self._store.flush()
        return find_state(self._store, self._header.name, self._store.manifest(self._header.name).entries)

    def adopt_prefix(self, ids: Tensor) -> int:
        """Take over what streams of the store hold of coming tokens, so that no forward has to compute it again.

        Keys name a block by its tokens and all before them, so the longest run is found without a model (as vLLM and
        SGLang find a prefix). Call it before `attach` or `bind`, then let the model read what is left.

        Args:
            ids: [num_tokens] int64: the tokens that come next, of an empty stream the text from its start.

        Returns:
            How many of them the stream holds now; whole blocks only, cut as in the stream that they are taken from.

        Raises:
            ReadOnlyError: the store was opened for reading.
            ShapeError: ids are not one sequence of int64.
            ConfigError: the stream is attached.
        """
        self._leave_session()
        return adopt_prefix(self._store, self._header, self._config, ids)

    def fork(self, name: str, at: int | None = None) -> Stream:
        """Make a stream that begins like this one; the blocks are shared, and both go on by themselves.

        Args:
            name: unique in the store.
            at: position of the first token that is not shared, the end of a block; None for all there are, which
                stores the last, unfinished block too.

        Raises:
            ConfigError: `at` is inside a block or behind the end, the name is taken, or the stream is attached.
        """
        self._leave_session()
        return Stream(self._store, self._store.fork(self._header.name, name, at).header, self._config)

    def rollback(self, at: int) -> None:
        """Forget the stream from position `at` on, the end of a block; bind or attach it again to go on.

        Raises:
            ConfigError: `at` is inside a block or behind the end, or the stream is attached.
        """
        self._leave_session()
        self._store.rollback(self._header.name, at)

    def _leave_session(self) -> None:
        """Store what was appended and let go of the session: its window is not the stream's end any more."""
        if self.is_attached:
            raise ConfigError(f"stream {self._header.name!r} is attached; leave attach() first")
        self.commit()
        self._session = self._recalled = None

    def _bound(self) -> Session:
        if self._session is None:
            raise ConfigError(f"stream {self._header.name!r} is not bound; call bind(rotate, device) first")
        return self._session
