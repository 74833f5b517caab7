# SPDX-License-Identifier: Apache-2.0
"""Runs of keys and values outside any stream: made from token ids, and continued by the model as its past."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvstore.engines.anatomy import attention_modules, position_rows, rotation_of


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Consecutive tokens as a model keeps them; on the model's device and in its dtype.

    Args:
        keys: [num_layers, kv_heads, num_tokens, key_dim], before RoPE.
        values: [num_layers, kv_heads, num_tokens, value_dim].
        continuation: [1, count] int64, tokens that follow.
        first_token: position of the first token in the text or stream that the run was cut from.
    """

    keys: Tensor
    values: Tensor
    continuation: Tensor
    first_token: int


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let gradients pass through a model and not to its weights, also inside inference mode."""
    with ExitStack() as undo:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                undo.callback(parameter.requires_grad_, True)
        undo.enter_context(torch.inference_mode(False))
        yield


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 without a copy of it: a module's weights are widened while it runs.

    In bfloat16 the smallest change of a key or value sets off other roundings in every layer behind it, which move the
    next-token distribution further than 8-bit keys and values do.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if any(parameter.dtype != torch.float32 for parameter in module.parameters(recurse=False)):
                weights = _Weights()
                undo.callback(module.register_forward_pre_hook(weights.widen).remove)
                undo.callback(module.register_forward_hook(weights.restore, always_call=True).remove)
        yield


class _Weights:
    """One module's weights while it runs; its methods are hooks."""

    def __init__(self) -> None:
        self._kept: dict[str, nn.Parameter | None] = {}

    def widen(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook."""
        self._kept = dict(module._parameters)
        for name, weight in self._kept.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)

    def restore(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, called after a failure too."""
        module._parameters.update(self._kept)


def read_run(model: Any, ids: Tensor, continuation: Tensor) -> Run:
    """Let a model read tokens, `ids` [1, num_tokens] int64, from position 0 on; `continuation` is not read."""
    made: dict[int, Tensor] = {}

    def keeper(layer: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            made[layer] = output

        return keep

    cache = DynamicCache()
    modules = attention_modules(model)
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        for layer, module in enumerate(modules):
            last = getattr(module, "k_norm", None) or module.k_proj
            assert isinstance(last, nn.Module), "attention_modules found it"
            undo.callback(last.register_forward_hook(keeper(layer)).remove)
        model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers: list[Any] = cache.layers
        values = torch.stack([layer.values[0] for layer in layers])
        heads, num_tokens = values.shape[1], ids.shape[1]
        keys = torch.stack([made[layer].view(num_tokens, heads, -1).transpose(0, 1) for layer in range(len(modules))])
    return Run(keys, values, continuation, first_token=0)


def continue_run(model: Any, keys: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """Run tokens through a model whose past is given.

    Args:
        model: a transformers model that can be attached.
        keys: [num_layers, kv_heads, num_tokens, key_dim] before RoPE; may want gradients.
        values: [num_layers, kv_heads, num_tokens, value_dim].
        ids: [1, count] int64, what follows.

    Returns:
        [count, vocabulary] float32, log-probabilities of the token after each.
    """
    logits: Tensor = model(input_ids=ids.to(model.device), past_key_values=_past(model, keys, values)).logits
    return logits[0].float().log_softmax(-1)


def sample_continuation(
    model: Any, keys: Tensor, values: Tensor, start: int, count: int, generator: torch.Generator
) -> Tensor:
    """Let a model go on by itself, where nobody knows the tokens that followed.

    Args:
        model: as in `continue_run`.
        keys: likewise.
        values: likewise.
        start: the first token, e.g. a line break.
        count: tokens, `start` included.
        generator: on the CPU.

    Returns:
        [1, count] int64: `start`, then what was drawn from the model's distribution.
    """
    ids = [start]
    with torch.inference_mode(False), torch.no_grad():
        cache = _past(model, keys, values)
        while len(ids) < count:
            logits = model(input_ids=torch.tensor([ids[-1:]], device=model.device), past_key_values=cache).logits
            ids.append(int(torch.multinomial(logits[0, -1].float().softmax(-1).cpu(), 1, generator=generator)))
    return torch.tensor([ids])


def _past(model: Any, keys: Tensor, values: Tensor) -> DynamicCache:
    positions = torch.arange(keys.shape[2], device=keys.device).expand(position_rows(model), 1, -1)
    rotate = rotation_of(model)
    cache = DynamicCache()
    for layer in range(keys.shape[0]):
        cache.update(rotate(keys[layer][None], positions), values[layer][None], layer)
    return cache
