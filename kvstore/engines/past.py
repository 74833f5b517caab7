# SPDX-License-Identifier: Apache-2.0
"""Runs of keys and values outside any stream: made from token ids, and continued by the model as its past."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from kvstore.engines.anatomy import attention_modules, decoder_of, linear_layers, position_rows, rotation_of
from kvstore.errors import CalibrationError
from kvstore.retrieval.tokens import Rotate


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
    """Let gradients pass through a model and not to its weights, also inside inference mode.

    Raises:
        CalibrationError: the weights were loaded in inference mode, and can never take part in gradients.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise CalibrationError(f"{type(model).__name__}: loaded inside torch.inference_mode(); load it outside")
    with ExitStack() as undo:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                undo.callback(parameter.requires_grad_, True)
        undo.enter_context(torch.inference_mode(False))
        yield


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Let a decoder keep what its layers begin from, and compute all else again for gradients (arXiv:1604.06174).

    What is computed in here must not change a cache: its layers run once more in every backward pass.
    """
    with ExitStack() as undo:
        for layer in decoder_of(model).layers:  # type: ignore[union-attr]
            if "forward" in vars(layer):  # of its own: libraries that move weights wrap it so
                undo.callback(setattr, layer, "forward", layer.forward)
            else:
                undo.callback(vars(layer).pop, "forward")
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 without a copy of it: a module's weights are widened while it runs.

    In bfloat16 the smallest change of a key or value sets off other roundings in every layer behind it, which move the
    next-token distribution further than 8-bit keys and values do.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, nn.Embedding):  # its table is large, and looking up is exact
                undo.callback(module.register_forward_hook(_widen_output).remove)
            elif any(parameter.dtype != torch.float32 for parameter in module.parameters(recurse=False)):
                weights = _Weights()
                undo.callback(module.register_forward_pre_hook(weights.widen).remove)
                undo.callback(module.register_forward_hook(weights.restore, always_call=True).remove)
                undo.callback(weights.put_back, module)  # Ctrl-C in the middle of a module calls no hook
        yield


def _widen_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()


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
        self.put_back(module)

    def put_back(self, module: nn.Module) -> None:
        """Give the module its own weights, if it has not got them."""
        module._parameters.update(self._kept)


def read_run(model: Any, ids: Tensor, continuation: Tensor) -> Run:
    """Let a model read tokens, `ids` [1, num_tokens] int64, from position 0 on; `continuation` is not read."""
    _refuse_hybrid(model)
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
    logits: Tensor = model(input_ids=ids.to(model.device), past_key_values=_given(model, keys, values)).logits
    return logits[0].float().log_softmax(-1)


def states_behind(model: Any, keys: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """What a model's decoder makes of tokens whose past is given: [count, hidden_size]; see `continue_run`."""
    found = decoder_of(model)(input_ids=ids.to(model.device), past_key_values=_given(model, keys, values))
    states: Tensor = found.last_hidden_state[0]
    return states


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
        cache = _growing(model, keys, values)
        while len(ids) < count:
            logits = model(input_ids=torch.tensor([ids[-1:]], device=model.device), past_key_values=cache).logits
            ids.append(int(torch.multinomial(logits[0, -1].float().softmax(-1).cpu(), 1, generator=generator)))
    return torch.tensor([ids])


class _GivenLayer(CacheLayerMixin):
    """A layer's past for one forward. It is widened and rotated when the layer asks, and no layer's stays."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, rotate: Rotate, positions: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys[None], values[None]
        self._rotate = rotate
        self._positions = positions
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the past is given."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Join past and new tokens, in the dtype of the new ones."""
        assert self.keys is not None, "given"
        assert self.values is not None, "given"
        past = self._rotate(self.keys.to(key_states.dtype), self._positions)
        return (
            torch.cat([past, key_states], dim=2),
            torch.cat([self.values.to(value_states.dtype), value_states], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of the mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the past."""
        return self._positions.shape[-1]

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1


def _given(model: Any, keys: Tensor, values: Tensor) -> Cache:
    rotate, positions = rotation_of(model), _positions(model, keys)
    layers = [_GivenLayer(*layer, rotate, positions) for layer in zip(keys, values, strict=True)]
    return Cache(layers=list(layers))


def _growing(model: Any, keys: Tensor, values: Tensor) -> DynamicCache:
    rotate, positions = rotation_of(model), _positions(model, keys)
    cache = DynamicCache()
    for layer in range(keys.shape[0]):
        cache.update(rotate(keys[layer][None], positions), values[layer][None], layer)
    return cache


def _positions(model: Any, keys: Tensor) -> Tensor:
    _refuse_hybrid(model)
    return torch.arange(keys.shape[2], device=keys.device).expand(position_rows(model), 1, -1)


def _refuse_hybrid(model: Any) -> None:
    """A past of keys and values is not all that a hybrid model needs."""
    if linear_layers(model):
        raise CalibrationError(f"{type(model).__name__}: it has linear layers; use a lossless profile")
