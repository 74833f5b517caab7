# SPDX-License-Identifier: Apache-2.0
"""Keeps a vision-language model's own count of M-RoPE positions apart for every stream and question."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvstore.engines.tier_cache import TierCache


class RopeDeltas:
    """The `rope_deltas` of a model: next position minus tokens so far, of the sequence that it ran last.

    The model keeps one such number, outside its cache, so a question would number the next part of the stream, and a
    reopened stream would be numbered as if it held text only. This loads and saves it with the cache it belongs to.
    Models without M-RoPE have none, and nothing happens.

    Args:
        model: any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owner: Any = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)
        self._before = getattr(self._owner, "rope_deltas", None)

    def load(self, cache: object) -> None:
        """Give the model what belongs to `cache`; another kind of cache is left to the engine."""
        if self._owner is None or not isinstance(cache, TierCache):
            return
        view, branch = cache.session.view, cache.branch
        if branch is not None and branch.num_tokens:
            self._owner.rope_deltas = cache.rope_deltas
        elif cache.num_tokens:
            delta = view.end_position - view.num_tokens
            self._owner.rope_deltas = torch.tensor([[delta]], device=view.residency.pool.device)
        else:
            self._owner.rope_deltas = None

    def save(self, cache: object) -> None:
        """Take from the model what it has counted for `cache`."""
        if self._owner is not None and isinstance(cache, TierCache):
            cache.rope_deltas = self._owner.rope_deltas

    def restore(self) -> None:
        """Put back what the model had before it was attached."""
        if self._owner is not None:
            self._owner.rope_deltas = self._before
