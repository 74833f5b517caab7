# SPDX-License-Identifier: Apache-2.0
"""Streams of a store folder that share blocks: forked, rolled back, continued by what another has."""

from __future__ import annotations

from collections.abc import Mapping

from kvstore.tiers.manifest import JSON, Manifest
from kvstore.tiers.moving.block_calls import BlockCalls
from kvstore.tiers.moving.forking import adopt, fork, rollback
from kvstore.tiers.tables.prefixes import KeyOf
from kvstore.tiers.tables.streams import read_manifest


class ForkCalls(BlockCalls):
    """The calls of a store that copy and cut manifests, and leave blocks where they are. Thread-safe."""

    def fork(self, source: str, name: str, at: int | None = None, cursor: Mapping[str, JSON] | None = None) -> Manifest:
        """Make a stream that begins like another, in one transaction; they share blocks, which are counted, not copied.

        Args:
            source: the other stream; what was appended to it before is part of it.
            name: of the new one.
            at: tokens to share, the end of a block; None for all.
            cursor: where the producer of the new stream stands; None for `source`'s where all is shared, else for `{}`.

        Raises:
            StreamNotFoundError: there is no stream `source`.
            ConfigError: `at` is inside a block or behind the end, or the name is taken.
            KVStoreError: what an earlier append ran into.
        """
        self._check_open(writing=True)
        fork(self._disk, self._data, source, name, at, cursor)
        with self._disk.catalogue.read() as view:
            return read_manifest(view, name)

    def adopt(self, name: str, key_of: KeyOf, kind: str) -> int:
        """Let a stream go on with what other streams hold, as far as one of them does, in one transaction.

        Args:
            name: the stream; nobody else may be appending to it.
            key_of: names the blocks that would come next.
            kind: of objects without which a stream cannot go on, as states of hybrid models: where the stream or the
                other one has any, what is added ends at one, which is shared.

        Returns:
            Tokens that were added; entries keep the media spans that they have there.

        Raises:
            StreamNotFoundError, KVStoreError: see `fork`.
        """
        self._check_open(writing=True)
        return adopt(self._disk, self._data, name, key_of, kind)

    def rollback(self, name: str, at: int, cursor: Mapping[str, JSON] | None = None) -> int:
        """Forget the end of a stream, in one transaction, and the blocks that nothing else needs.

        Args:
            name: the stream; nobody else may be appending to it.
            at: tokens that stay, the end of a block.
            cursor: where the producer stands there; None for `{}`, as the store cannot know.

        Returns:
            Bytes freed.

        Raises:
            StreamNotFoundError, ConfigError, KVStoreError: see `fork`.
        """
        self._check_open(writing=True)
        return rollback(self._disk, self._data, name, at, cursor or {})
