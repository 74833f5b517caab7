# SPDX-License-Identifier: Apache-2.0
"""The adapter for Hugging Face transformers: hooks, cache object, attention function.

The keys and queries that a layer's projections produce are taken before RoPE by forward hooks; the cache object tells
the model how long the sequence is; a registered attention function attends to what the session or branch hands it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvstore.engines.anatomy import attention_modules, decoder_of, rotary_of
from kvstore.engines.content import content_ids
from kvstore.errors import ConfigError, ShapeError
from kvstore.kernels.reference import received_mass
from kvstore.session.attending import AttentionInputs
from kvstore.session.branch import Branch
from kvstore.session.recall import Recall
from kvstore.session.session import Session

_NAME = "kvstore"
_CAPTURE = "_kvstore_capture"
_RECEIVED_QUERIES = 32


class _Capture:
    """What the hooks of one attached model see of the running forward."""

    def __init__(self) -> None:
        self.cache: TierCache | None = None
        self.ids: Tensor = torch.empty(0, dtype=torch.int64)
        self.positions: Tensor = torch.empty(0, dtype=torch.int64)
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}


class TierLayer(CacheLayerMixin):
    """One layer's view of a `TierCache`: reports logical lengths, hands new keys and values through."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, owner: TierCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; nothing is allocated here."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values: the attention function joins them with the past."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of the mask: it covers the tail of the running question, never the stored past."""
        return self._owner.mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """Logical tokens so far: what the next position is counted from."""
        return self._owner.num_tokens

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    get_max_cache_shape = get_max_length


class TierCache(Cache):
    """A transformers cache over a stream (tokens are appended to it) or over a branch (tokens are forgotten).

    Args:
        session: the stream.
        branch: the question; None appends to the stream.
    """

    def __init__(self, session: Session, branch: Branch | None) -> None:
        self.session = session
        self.branch = branch
        super().__init__(layers=[TierLayer(self) for _ in range(session.view.num_layers)])

    @property
    def num_tokens(self) -> int:
        """Logical length: the stream's tokens, or the question's."""
        if self.branch is None:
            return self.session.num_tokens
        return self.branch.first_token + self.branch.num_tokens

    def mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `TierLayer.get_mask_sizes`."""
        if self.branch is None:
            return query_length, self.session.num_tokens
        return self.branch.num_tokens + query_length, self.branch.first_token

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; 0 or negative, as transformers counts."""
        if tokens_to_remove < 0:
            (self.branch or self.session).drop(-tokens_to_remove)

    def reset(self) -> None:
        """Forget the question; a stream cannot be reset, it is what is stored."""
        if self.branch is None:
            raise ConfigError("a stream's cache cannot be reset; start another stream or remove it from the store")
        self.branch.drop(self.branch.num_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences of a beam search."""
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._rows(torch.arange(self._batch()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._rows(indices)

    def _batch(self) -> int:
        return self.branch.batch if self.branch is not None else 1

    def _rows(self, rows: Tensor) -> None:
        if self.branch is None:
            if rows.numel() == 1:
                return
            self.branch = self.session.branch(continues=True)
        self.branch.take_rows(rows)

    def extend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, capture: _Capture) -> AttentionInputs:
        """Append one layer of a forward to the branch or the stream; a batch on a stream branches off it."""
        positions = capture.positions if capture.positions.dim() == 3 else capture.positions[None]
        positions = positions.expand(-1, keys.shape[0], -1)
        if self.branch is None and keys.shape[0] > 1:
            self.branch = self.session.branch(continues=True)
        if self.branch is not None:
            return self.branch.extend(layer, query, keys, values, positions)
        return self.session.extend(layer, query, keys, values, positions, capture.ids)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; a forward without our cache is plain sdpa."""
    capture: _Capture | None = getattr(module, _CAPTURE, None)
    if capture is None or capture.cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    cache, layer = capture.cache, int(module.layer_idx)  # type: ignore[arg-type]
    query = capture.queries.pop(layer).view(query.shape[0], query.shape[2], query.shape[1], -1).transpose(1, 2)
    key = capture.keys.pop(layer).view(key.shape[0], key.shape[2], key.shape[1], -1).transpose(1, 2)
    inputs = cache.extend(layer, query, key, value, capture)
    if cache.branch is None and attention_mask is not None:
        raise ShapeError("a stream takes one unpadded sequence; drop the padding, or ask on a branch")
    if attention_mask is None and inputs.keys.shape[2] == inputs.query.shape[2]:
        mask = None  # nothing before these tokens: sdpa's own causal path, as the engine itself would take
    else:
        mask = inputs.mask(attention_mask)
    scale = kwargs["scaling"]
    if cache.branch is None:
        cache.session.receive(layer, _received(inputs, scale))
    if inputs.query_far is not None:
        return inputs.attend(inputs.mask(attention_mask), scale).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, inputs.query, inputs.keys, inputs.values, mask, **kwargs)


def _received(inputs: AttentionInputs, scale: float) -> Tensor:
    """Attention mass of every key, `[kv_heads, num_keys]`, estimated from evenly spaced queries."""
    stride = max(inputs.query.shape[2] // _RECEIVED_QUERIES, 1)
    mask = inputs.mask(None)
    if mask is not None:
        mask = mask[:, :, ::stride]
    query, keys = inputs.query[:, :, ::stride], inputs.keys
    return received_mass(query, keys, num_received=keys.shape[2], mask=mask, scale=scale)


class Attached:
    """A model with a stream attached: what the `with` statement of `attach` hands out.

    Inside it, a forward without a cache appends to the stream; `generate()` asks on a fresh branch.
    """

    def __init__(self, model: PreTrainedModel, session: Session) -> None:
        self.model = model
        self.session = session
        self.last = Recall()

    def cache(self) -> TierCache:
        """A cache that appends to the stream: its length is the stream's."""
        return TierCache(self.session, None)

    def question(self, input_ids: Tensor | None = None) -> TierCache:
        """A cache for one question and its answer; neither is stored.

        Args:
            input_ids: [1, num_tokens] int64: the bare question, to retrieve by. Without it, the prompt's first forward
                retrieves by the whole prompt.
        """
        branch = self.session.branch()
        self.last = branch.recall
        cache = TierCache(self.session, branch)
        if input_ids is not None:
            branch.begin_recall()
            with torch.inference_mode():
                decoder_of(self.model)(input_ids=input_ids, past_key_values=cache, use_cache=True)
            branch.end_recall()
            self.last = branch.recall
        return cache


@contextmanager
def attach(model: PreTrainedModel, session: Session) -> Iterator[Attached]:
    """Attach a session to a model for the length of a `with` block.

    Args:
        model: a decoder with full attention and NeoX-style RoPE: Llama, Qwen2, Qwen3, Mistral and their kin, or a
            vision-language model around one.
        session: a session over a stream of this model's spec; see `rotation_of` and `spec_of`.

    Raises:
        ConfigError: the model's attention cannot be attached; the message names the part.
    """
    decoder = decoder_of(model)
    layers = attention_modules(model)
    capture = _Capture()
    attached = Attached(model, session)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    config = model.config
    before = config.get_text_config(decoder=True)._attn_implementation
    sub_configs = getattr(config, "sub_configs", {})
    is_nested = "text_config" in sub_configs
    handles = [
        model.register_forward_pre_hook(_cache_hook(attached), with_kwargs=True),
        decoder.register_forward_pre_hook(_decoder_hook(attached, capture), with_kwargs=True),
        decoder.register_forward_hook(_release_hook(capture), always_call=True),
        rotary_of(model).register_forward_pre_hook(_position_hook(capture), with_kwargs=True),
    ]
    for layer, module in enumerate(layers):
        setattr(module, _CAPTURE, capture)
        for kind, store in (("q", capture.queries), ("k", capture.keys)):
            last = getattr(module, f"{kind}_norm", None) or getattr(module, f"{kind}_proj")
            handles.append(last.register_forward_hook(_projection_hook(store, layer)))
    model.set_attn_implementation({"text_config": _NAME} if is_nested else _NAME)
    try:
        yield attached
    finally:
        for handle in handles:
            handle.remove()
        for module in layers:
            delattr(module, _CAPTURE)
        model.set_attn_implementation({"text_config": before} if is_nested else before)


def _cache_hook(attached: Attached) -> Callable[..., Any]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get("past_key_values")
        if given is None and kwargs.get("use_cache") is not False:
            kwargs["past_key_values"] = attached.cache()
        elif isinstance(given, DynamicCache) and given.get_seq_length() == 0:
            kwargs["past_key_values"] = attached.question()
        return args, kwargs

    return hook


def _decoder_hook(attached: Attached, capture: _Capture) -> Callable[..., Any]:
    inject = _cache_hook(attached)

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = inject(module, args, kwargs)
        cache = kwargs.get("past_key_values")
        capture.cache = cache if isinstance(cache, TierCache) else None
        if capture.cache is not None:
            capture.ids = content_ids(args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            branch = capture.cache.branch
            if branch is not None and branch.needs_recall:
                branch.begin_recall()
                module.forward(*args, **kwargs)
                branch.end_recall()
                attached.last = branch.recall
        return args, kwargs

    return hook


def _release_hook(capture: _Capture) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        capture.cache = None

    return hook


def _position_hook(capture: _Capture) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture.positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    return hook


def _projection_hook(store: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        store[layer] = output

    return hook
