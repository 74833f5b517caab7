# SPDX-License-Identifier: Apache-2.0
"""What forward hooks take from a running model: the vectors before RoPE, their positions, and what they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvstore.engines.tier_cache import TierCache
from kvstore.errors import ConfigError

CAPTURE = "_kvstore_capture"
"""The attribute under which an attached attention module finds its `Capture`."""


class Capture:
    """The running forward of one attached model; empty between forwards. Its methods are hooks.

    Args:
        layers: the attention modules, in order.

    Attributes:
        cache: what the forward extends; None for one that is not ours.
        ids: [num_new] int64 content ids.
        positions: [rows, batch, num_new] or [batch, num_new] int64, as the rotary embedding got them.
        queries, keys: by layer, what the last projection or norm before RoPE made.
        layer_of: number among the attention layers, by the model's own number of a layer.
        checked_layers: layers whose vectors were compared with the engine's.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layer_of = {int(module.layer_idx): number for number, module in enumerate(layers)}  # type: ignore[arg-type]
        self.cache: TierCache | None = None
        self.ids = torch.empty(0, dtype=torch.int64)
        self.positions = torch.empty(0, dtype=torch.int64)
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.checked_layers: set[int] = set()

    def take(self, store: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        """Take a layer's vectors off, in the shape `[batch, heads, num_new, dim]` of those that the engine made."""
        return store.pop(layer).view(like.shape[0], like.shape[2], like.shape[1], -1).transpose(1, 2)

    def clear(self) -> None:
        """Forget the forward, finished or not."""
        self.cache = None
        self.ids = self.positions = torch.empty(0, dtype=torch.int64)
        self.queries.clear()
        self.keys.clear()

    def release(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the decoder, called after a failure too.

        Raises:
            ConfigError: the forward ended and its attention never came for its vectors.
        """
        is_unused = output is not None and bool(self.queries)
        if (
            self.cache is not None
            and self.cache.branch is None
            and self.cache.states is not None
            and output is not None
        ):
            self.cache.states.end(self.cache.num_tokens)
        self.clear()
        if is_unused:
            raise ConfigError(f"{type(module).__name__}: its attention ignores the attention interface of transformers")

    def note_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the rotary embedding."""
        self.positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def keeper(self, store: dict[int, Tensor], layer: int) -> Callable[..., None]:
        """Make the forward hook of one projection or norm: it keeps the output, if the forward is ours."""

        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.cache is not None:
                store[layer] = output

        return keep
