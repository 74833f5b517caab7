# SPDX-License-Identifier: Apache-2.0
"""The public face: a store, its streams, and a model attached to one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore.codec import Profile
from kvstore.config import Access, Durability
from kvstore.errors import ConfigError, SpecMismatchError, StreamNotFoundError
from kvstore.layout import BlockLayout
from kvstore.retrieval.policies import policy_named
from kvstore.session.attending import Rotate
from kvstore.session.branch import Branch
from kvstore.session.recall import Recall
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.spec import BlockKey, ModelSpec
from kvstore.store import Outcome, Store, check_spec
from kvstore.tiers.manifest import StreamHeader

if TYPE_CHECKING:
    from kvstore.engines.transformers import Attached, Model


class KVStore:
    """An open store; close it with `with`. Made by `open`.

    Args:
        store: the block store.
        layout: layout of the blocks that it moves.
        profile: how new blocks are coded.
    """

    def __init__(self, store: Store, layout: BlockLayout, profile: Profile) -> None:
        self.blocks = store
        self._layout = layout
        self._profile = profile

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is queued, then close."""
        self.blocks.close()

    def stream(
        self,
        name: str,
        *,
        policy: str = "auto",
        window_tokens: int = 1024,
        sink_tokens: int = 16,
        budget_tokens: int = 256,
        device_nbytes: int = 256 << 20,
    ) -> Stream:
        """Open a stream, or start one where the store is open for writing.

        Args:
            name: unique in the store.
            policy: what a question retrieves by: `auto`, `maxsim`, `rekv`, `infllm`, `streaming_llm`.
            window_tokens: most recent tokens that an appending forward attends to.
            sink_tokens: first tokens, attended always.
            budget_tokens: most tokens of retrieved blocks per question.
            device_nbytes: memory of the device pool; the window, the sinks and the blocks of a question must fit.

        Raises:
            SpecMismatchError: another model wrote the stream, or this one with blocks of another size.
            StreamNotFoundError: the store is open for reading and holds no such stream.
            ConfigError: no such policy, or the stream was written with other settings.
        """
        config = SessionConfig(
            policy=policy_named(policy),
            window_tokens=window_tokens,
            sink_tokens=sink_tokens,
            budget_tokens=budget_tokens,
            device_nbytes=device_nbytes,
        )
        layout = self._layout
        if self.blocks.is_writable:
            new = StreamHeader(
                name, layout.spec, layout.block_tokens, self._profile, config.prefill, {}, created_unix_s=time.time()
            )
            try:
                header = self.blocks.manifest(name).header
                new = replace(new, source=header.source)
            except StreamNotFoundError:
                pass
            header = self.blocks.create_stream(new).header  # refuses a stream that was written with other settings
        else:
            header = self.blocks.manifest(name).header
        check_spec(header, layout.spec)
        if header.block_tokens != layout.block_tokens:
            raise SpecMismatchError(
                f"stream {name!r} has blocks of {header.block_tokens} tokens, not {layout.block_tokens}; "
                f"open the store with block_tokens={header.block_tokens}"
            )
        return Stream(self.blocks, header, config)

    def put(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        timeout_s: float | None = None,
    ) -> list[Outcome]:
        """Store plain blocks, for engines with a policy of their own; see `Store.put`."""
        return self.blocks.put(keys, slots, num_tokens, timeout_s=timeout_s)

    def get(
        self, keys: Sequence[BlockKey], slots: Sequence[Tensor], *, timeout_s: float | None = None
    ) -> list[Outcome]:
        """Bring plain blocks into slots; see `Store.get`."""
        return self.blocks.get(keys, slots, timeout_s=timeout_s)


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
        self.last = Recall()

    def bind(self, rotate: Rotate | None, device: torch.device, rows: int = 1) -> Session:
        """Give the stream its rotary function and device; once per process.

        Args:
            rotate: `(vectors [batch, heads, tokens, dim], positions [rows, batch, tokens]) -> vectors`; None where keys
                and queries arrive rotated.
            device: where attention runs.
            rows: rows of a position: 1, or 3 for M-RoPE.
        """
        if self._session is None:
            self._session = Session(self._store, self._header, self._config, rotate, device, rows)
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
    def recalling(self) -> Iterator[None]:
        """Start a question: the forward inside selects the blocks that `asking` will attend to."""
        self._recalled = None
        branch = self._bound().branch()
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

    def _bound(self) -> Session:
        if self._session is None:
            raise ConfigError(f"stream {self._header.name!r} is not bound; call bind(rotate, device) first")
        return self._session


def open(  # noqa: A001 - reads as kvstore.open
    path: str | os.PathLike[str],
    spec: ModelSpec,
    *,
    access: Access = Access.WRITE,
    block_tokens: int = 128,
    profile: Profile = Profile.LOSSLESS,
    host_nbytes: int = 1 << 30,
    disk_nbytes: int | None = None,
    durability: Durability = Durability.COMMIT,
    eviction: str = "lru",
    admission: str = "always",
    stream_nbytes: int | None = None,
) -> KVStore:
    """Open the store in a folder for one model.

    Args:
        path: the folder; a writer makes it.
        spec: the model's KV geometry; see `spec_of`.
        access: one writer, any number of readers.
        block_tokens: tokens of a block.
        profile: how new blocks are coded.
        host_nbytes: memory of the host tier.
        disk_nbytes: most bytes on disk; None means as much as the disk holds.
        durability: what an acknowledged write survives.
        eviction: who leaves the host tier when it is full: `lru`, `s3-fifo`, `lfu` or `participation`.
        admission: which blocks that were read stay in it: `always`, or from the `second-use` on.
        stream_nbytes: most bytes of one stream's blocks in it; None for no limit.

    Raises:
        StoreNotFoundError, BusyError, ReadOnlyError, UnsupportedFormatError, CorruptRecordError: see `Store.open`.
    """
    layout = BlockLayout(spec, block_tokens)
    store = Store.open(
        path,
        access=access,
        layout=layout,
        profile=profile,
        host_nbytes=host_nbytes,
        disk_nbytes=disk_nbytes,
        durability=durability,
        eviction=eviction,
        admission=admission,
        stream_nbytes=stream_nbytes,
    )
    return KVStore(store, layout, profile)


@contextmanager
def attach(model: Model, stream: Stream) -> Iterator[Attached]:
    """Attach a stream to a transformers model: forwards append, `generate()` asks; see `kvstore.engines.transformers`.

    On leaving the block, what was appended is stored, the last, unfinished block too. If the block raises, complete
    blocks that a later forward or question has handed to the store stay; what came after them is not stored, unless the
    same stream is attached or committed again.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigError: the model's attention cannot be attached.
    """
    from kvstore.engines.anatomy import position_rows, rotation_of
    from kvstore.engines.transformers import attach as attach_session

    session = stream.bind(rotation_of(model), model.device, position_rows(model))
    with attach_session(model, session) as attached:
        yield attached
    stream.last = attached.last
    if session.view.store.is_writable:
        stream.commit()
