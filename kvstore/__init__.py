# SPDX-License-Identifier: Apache-2.0
"""Owns the life of KV cache blocks outside the attention kernel."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.codec import Profile as Profile
    from kvstore.config import Access as Access
    from kvstore.config import Durability as Durability
    from kvstore.engines.anatomy import spec_of as spec_of
    from kvstore.errors import KVStoreError as KVStoreError
    from kvstore.face import KVStore as KVStore
    from kvstore.face import attach as attach
    from kvstore.face import open as open  # noqa: A004 - reads as kvstore.open
    from kvstore.session.contexts.contexts import Contexts as Contexts
    from kvstore.session.recall import Recall as Recall
    from kvstore.session.recall import Span as Span
    from kvstore.session.state import SavedState as SavedState
    from kvstore.session.stream import Stream as Stream
    from kvstore.spec import BlockKey as BlockKey
    from kvstore.spec import ModelSpec as ModelSpec
    from kvstore.spec import chain_key as chain_key

# Names are loaded on first use: importing torch takes two seconds, and the command line must not wait for it.
_HOMES = {
    "codec": ("Profile",),
    "config": ("Access", "Durability"),
    "engines.anatomy": ("spec_of",),
    "errors": ("KVStoreError",),
    "face": ("KVStore", "attach", "open"),
    "session.contexts.contexts": ("Contexts",),
    "session.recall": ("Recall", "Span"),
    "session.state": ("SavedState",),
    "session.stream": ("Stream",),
    "spec": ("BlockKey", "ModelSpec", "chain_key"),
}
_HOME_OF = {name: f"kvstore.{module}" for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
