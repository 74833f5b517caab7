# SPDX-License-Identifier: Apache-2.0
"""The public face: a store, its streams, and a model attached to one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from kvstore.codec import Profile
from kvstore.config import Access, Durability
from kvstore.errors import SpecMismatchError, StreamNotFoundError
from kvstore.layout import BlockLayout
from kvstore.retrieval.registry import policy_named
from kvstore.session.contexts.contexts import Contexts
from kvstore.session.stream import Stream
from kvstore.session.view import SessionConfig
from kvstore.spec import BlockKey, ModelSpec
from kvstore.store import Outcome, Store, check_spec
from kvstore.tiers.manifest import StreamHeader
from kvstore.tiers.moving.backing import Backing

if TYPE_CHECKING:
    from kvstore.engines.attached import Attached
    from kvstore.engines.model import Model


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
        load_timeout_s: float | None = None,
        prefetch_tokens: int = 0,
    ) -> Stream:
        """Open a stream, or start one where the store is open for writing.

        Args:
            name: unique in the store.
            policy: what a question retrieves by: `auto`, or another by name (docs/policies.md).
            window_tokens: most recent tokens that an appending forward attends to.
            sink_tokens: first tokens, attended always.
            budget_tokens: most tokens of retrieved blocks per question.
            device_nbytes: memory of the device pool; the window, the sinks and the blocks of a question must fit.
            load_timeout_s: seconds that a question waits for its blocks each time it loads some, then answers without
                those that are late; None waits for all.
            prefetch_tokens: tokens of the next best blocks to bring to memory behind a question that ranks the stream
                once (`maxsim`); 0 brings none.

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
            load_timeout_s=load_timeout_s,
            prefetch_tokens=prefetch_tokens,
        )
        layout = self._layout
        if self.blocks.is_writable:
            new = StreamHeader(
                name, layout.spec, layout.block_tokens, self._profile, config.prefill, {}, created_unix_s=time.time()
            )
            try:
                header = self.blocks.header(name)
                new = replace(new, source=header.source)
            except StreamNotFoundError:
                pass
            header = self.blocks.create_stream(new).header  # refuses a stream that was written with other settings
        else:
            header = self.blocks.header(name)
        self._check(header)
        return Stream(self.blocks, header, config)

    def contexts(
        self,
        names: Sequence[str],
        *,
        policy: str = "ape",
        placed: str = "parallel",
        budget_tokens: int | None = None,
        sink_tokens: int = 16,
        device_nbytes: int = 256 << 20,
        load_timeout_s: float | None = None,
    ) -> Contexts:
        """Put streams that were read apart under one question (docs/policies.md); `attach` takes them, to be asked.

        Args:
            names: the streams. What all of them begin with, as forks of one stream do, is stored and attended once.
            policy: its temperature and scale count, and what it selects by where there is a budget.
            placed: `parallel`, all behind what they begin with and over each other (APE, arXiv:2502.05431); or
                `consecutive`, one behind the other (Block-Attention, arXiv:2409.15355).
            budget_tokens: most tokens of retrieved units, of all contexts together; None reads them whole.
            sink_tokens: of a stream that is alone, the first tokens that are read always.
            device_nbytes: memory of the device pool; contexts that are larger are read in turns.
            load_timeout_s: see `stream`.

        Raises:
            StreamNotFoundError: the store holds no stream of one of the names.
            SpecMismatchError: another model wrote one of them, or this one with blocks of another size.
            ConfigError: no such policy or place, a stream named twice, or streams that were written with other
                settings.
        """
        headers = [self.blocks.header(name) for name in names]
        for header in headers:
            self._check(header)
        config = SessionConfig(
            policy=policy_named(policy),
            sink_tokens=sink_tokens,
            budget_tokens=budget_tokens or 0,
            device_nbytes=device_nbytes,
            load_timeout_s=load_timeout_s,
        )
        return Contexts(self.blocks, headers, config, placed, is_whole=budget_tokens is None)

    def _check(self, header: StreamHeader) -> None:
        """Refuse a stream of another model, or with blocks of another size."""
        check_spec(header, self._layout.spec)
        if header.block_tokens != self._layout.block_tokens:
            raise SpecMismatchError(
                f"stream {header.name!r} has blocks of {header.block_tokens} tokens, not {self._layout.block_tokens}; "
                f"open the store with block_tokens={header.block_tokens}"
            )

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
    put_admission: str = "always",
    extent_folders: Sequence[str | os.PathLike[str]] = (),
    remote: Backing | None = None,
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
        put_admission: which plain blocks are written to disk: `always`, or from the `second-use` on.
        extent_folders: folders on other drives that blocks are spread over too; remembered.
        remote: a tier behind the disk, of the same layout (docs/remote.md); the caller closes it, after the store.

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
        put_admission=put_admission,
        extent_folders=extent_folders,
        remote=remote,
    )
    return KVStore(store, layout, profile)


@contextmanager
def attach(model: Model, stream: Stream) -> Iterator[Attached]:
    """Attach a stream to a transformers model: forwards append, `generate()` asks; see `kvstore.engines.transformers`.

    On leaving the block, what was appended is stored, the last, unfinished block too, and the state of a hybrid model's
    linear layers: the next one who attaches the stream goes on from it. If the block raises, complete
    blocks that a later forward or question has handed to the store stay; what came after them is not stored, unless the
    same stream is attached or committed again.

    Contexts of several streams are asked the same way; an appending forward is refused (`ReadOnlyError`).

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigError: the model's attention cannot be attached.
    """
    from kvstore.engines.anatomy import position_rows, rotation_of, trained_tokens_of
    from kvstore.engines.transformers import attach as attach_session

    session = stream.bind(rotation_of(model), model.device, position_rows(model), trained_tokens_of(model))
    with attach_session(model, session) as attached:
        stream.is_attached = True
        try:
            yield attached
        finally:
            stream.is_attached = False
    stream.last = attached.last
    if session.view.store.is_writable:
        attached.save_state()
        stream.commit()
