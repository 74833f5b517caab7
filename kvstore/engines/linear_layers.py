# SPDX-License-Identifier: Apache-2.0
"""States of the layers of a hybrid model that keep no keys and values: kept while a stream grows, saved, restored."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from kvstore.engines.anatomy import linear_layers
from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.session.contexts.session import ContextsSession
from kvstore.session.session import Session
from kvstore.session.state import find_state

_VERSION = 1
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_FIELDS = ("conv_states", "recurrent_states")


class LinearStates:
    """The conv and recurrent states of one sequence, as transformers' own cache layers hold them.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        count = int(getattr(config.get_text_config(decoder=True), "number_of_conv_states", 1))
        self.layers = {layer: LinearAttentionLayer(number_of_states=count) for layer in linear_layers(model)}
        self._device, self._num_states = next(model.parameters()).device, count
        self._num_tokens = 0
        self._is_running = False

    def begin(self, num_tokens: int) -> None:
        """Note that a forward begins behind so many tokens of the stream.

        Raises:
            ConfigError: the states are not those behind these tokens.
        """
        if self._is_running or num_tokens != self._num_tokens:
            raise ConfigError(
                "the states of the model's linear layers are not those at the stream's end, as a forward failed midway "
                "or tokens were taken back; roll the stream back to where a state was saved, and attach it again"
            )
        self._is_running = True
        for state in self.layers.values():
            _change(state, lambda tensor: tensor if _is_plain(tensor) else _clone(tensor))

    def end(self, num_tokens: int) -> None:
        """Note that the forward is through: the stream has so many tokens."""
        self._is_running, self._num_tokens = False, num_tokens

    def copy(self) -> LinearStates:
        """The same states in memory of their own, for a branch."""
        made = copy.copy(self)
        made.layers = {layer: _copied(state) for layer, state in self.layers.items()}
        return made

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undo what forwards inside the `with` block do."""
        before = self.copy()
        try:
            yield
        finally:
            for layer, state in before.layers.items():
                vars(self.layers[layer]).update(vars(state))

    def pack(self, num_tokens: int) -> list[bytes]:
        """Pack the states behind so many tokens: a description in JSON, then one part for each.

        Raises:
            ConfigError: like `begin`.
        """
        self.begin(num_tokens)
        self.end(num_tokens)
        described: list[dict[str, Any]] = []
        parts: list[bytes] = []
        for layer, state in self.layers.items():
            for number in range(self._num_states):
                for name in _FIELDS:
                    tensor = getattr(state, name)[number]
                    if tensor is not None:
                        described.append({"layer": layer, "number": number, "field": name, **_describe(tensor)})
                        parts.append(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        head = {"version": _VERSION, "states": described}
        return [json.dumps(head, separators=(",", ":")).encode(), *parts]

    def restore(self, session: Session) -> None:
        """Take up the states at the end of a stream; an empty stream needs none.

        Raises:
            ConfigError: no state was saved there, or these are several streams, whose states cannot be joined.
            CorruptRecordError: what was saved are not states of this model.
        """
        if isinstance(session, ContextsSession):
            raise ConfigError(
                f"contexts {session.view.header.name}: states of linear layers cannot be joined; ask the streams alone"
            )
        if session.num_tokens == 0:
            return
        name = session.view.header.name
        saved = find_state(session.view.store, name, session.view.entries)
        if saved is None or saved.num_tokens != session.num_tokens:
            where = (
                "was never saved" if saved is None else f"was last saved at {saved.num_tokens}: roll it back to there"
            )
            raise ConfigError(
                f"stream {name!r} has {session.num_tokens} tokens, and the state of the model's linear layers {where}"
            )
        try:
            self._unpack(saved.parts)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise CorruptRecordError(f"stream {name!r}: its state is not one of this model: {error!r}") from error
        self._num_tokens = saved.num_tokens

    def _unpack(self, parts: Sequence[bytes]) -> None:
        head = json.loads(parts[0])
        if head["version"] != _VERSION or len(head["states"]) != len(parts) - 1:
            raise ValueError(f"version {head['version']}, {len(head['states'])} states in {len(parts)} parts")
        found: set[int] = set()
        for described, data in zip(head["states"], parts[1:], strict=True):
            state, number, name = self.layers[described["layer"]], described["number"], described["field"]
            tensor = _tensor(described, data).to(self._device)
            if name not in _FIELDS or getattr(state, name)[number] is not None:
                raise ValueError(f"a state {name!r} of layer {described['layer']}")
            fields: dict[str, Any] = {name: tensor}
            state.lazy_initialization(**fields, state_idx=number)
            getattr(state, name)[number].copy_(tensor)
            state.has_previous_state[number] = True
            found.add(described["layer"])
        if found != self.layers.keys():
            raise ValueError(f"states of {len(found)} of {len(self.layers)} layers")


def _change(state: LinearAttentionLayer, change: Callable[[Tensor], Tensor]) -> None:
    for name in _FIELDS:
        tensors = getattr(state, name)
        setattr(state, name, {number: None if each is None else change(each) for number, each in tensors.items()})


def _copied(state: LinearAttentionLayer) -> LinearAttentionLayer:
    made = copy.copy(state)
    vars(made).update({name: copy.copy(value) for name, value in vars(state).items() if isinstance(value, dict)})
    _change(made, _clone)
    return made


def _is_plain(tensor: Tensor) -> bool:
    """Whether a forward in any mode may write to a tensor."""
    return not (tensor.is_inference() or tensor.requires_grad)


def _clone(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}


def _tensor(described: dict[str, Any], data: bytes) -> Tensor:
    dtype, shape = _DTYPES[described["dtype"]], [int(size) for size in described["shape"]]
    if min(shape, default=1) < 1 or prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for {shape} of {dtype}")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
