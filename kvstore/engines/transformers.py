# SPDX-License-Identifier: Apache-2.0
"""The adapter for Hugging Face transformers: hooks and the attention function.

The keys and queries that a layer's projections produce are taken before RoPE by forward hooks; the cache object tells
the model how long the sequence is; a registered attention function attends to what the session or branch hands it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvstore.engines.anatomy import attention_modules, decoder_of, position_rows, rotary_of, spec_of
from kvstore.engines.attached import Attached
from kvstore.engines.capture import CAPTURE, Capture
from kvstore.engines.content import content_ids
from kvstore.engines.model import Model
from kvstore.engines.rope_deltas import RopeDeltas
from kvstore.engines.tier_cache import TierCache
from kvstore.errors import ConfigError, ShapeError
from kvstore.session.session import Session
from kvstore.store import check_spec

__all__ = ["Attached", "Model", "TierCache", "attach"]


_NAME = "kvstore"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux")
_LAST = ("norm", "layernorm", "proj")
"""What may be the last before RoPE: a norm of queries or keys, else their projection."""
_CHECKED_TOKENS = 8


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; a forward without our cache is plain sdpa."""
    capture: Capture | None = getattr(module, CAPTURE, None)
    if capture is None or capture.cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if unknown := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise ConfigError(f"{type(module).__name__}: its attention needs {unknown}, which a stored past does not know")
    if capture.cache.branch is None and attention_mask is not None:
        raise ShapeError("a stream takes one unpadded sequence; drop the padding, or ask on a branch")
    # Buffers made here outlive the forward, and an inference tensor could not be written outside inference mode.
    with torch.inference_mode(False), torch.no_grad():
        return _tiered_attention(module, capture, capture.cache, query, key, value, attention_mask, **kwargs)


def _tiered_attention(
    module: nn.Module,
    capture: Capture,
    cache: TierCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    layer = capture.layer_of[int(module.layer_idx)]  # type: ignore[arg-type]
    positions = capture.positions if capture.positions.dim() == 3 else capture.positions[None]
    raw_query, raw_key = capture.take(capture.queries, layer, query), capture.take(capture.keys, layer, key)
    if layer not in capture.checked_layers:
        _check_layer(module, cache.session, (raw_query, raw_key), (query, key), positions)
        capture.checked_layers.add(layer)
    scale = kwargs["scaling"]
    inputs = cache.extend(layer, raw_query, raw_key, value, positions, capture.ids, scale)
    if attention_mask is None and inputs.keys.shape[2] == inputs.query.shape[2]:
        mask = None  # nothing before these tokens: sdpa's own causal path, as the engine itself would take
    else:
        mask = inputs.mask(attention_mask)
    is_ours = inputs.query_far is not None or inputs.context is not None
    is_faster = inputs.is_grouped and not kwargs.get("dropout") and (mask is not None or raw_query.shape[2] == 1)
    if is_ours or is_faster:
        return inputs.attend(inputs.mask(attention_mask), scale).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, inputs.query, inputs.keys, inputs.values, mask, **kwargs)


def _check_layer(
    module: nn.Module,
    session: Session,
    captured: tuple[Tensor, Tensor],
    made: tuple[Tensor, Tensor],
    positions: Tensor,
) -> None:
    """Make sure that the engine does nothing between the hooks and attention but rotate.

    A layer without RoPE, a norm after it, a rescaled query or a cut-off projection would otherwise change answers
    without a word.
    """
    rotate = session.view.rotate
    for raw, wanted in zip(captured, made, strict=True):
        raw, wanted = raw[:, :, :_CHECKED_TOKENS], wanted[:, :, :_CHECKED_TOKENS]
        where = positions[..., :_CHECKED_TOKENS].expand(-1, raw.shape[0], -1)
        had = raw if rotate is None else rotate(raw, where)
        error = (had.float() - wanted.float()).abs().max()
        if raw.numel() and not error <= 0.02 * wanted.float().abs().max():
            raise ConfigError(
                f"{type(module).__name__}: layer {module.layer_idx} changes queries or keys in another way than RoPE "
                "after its projections; it cannot be attached"
            )


@contextmanager
def attach(model: Model, session: Session) -> Iterator[Attached]:
    """Attach a session to a model for the length of a `with` block; the model leaves it as it came.

    Args:
        model: a decoder with full attention and NeoX-style RoPE: Llama, Qwen2, Qwen3, Mistral and their kin, a
            vision-language model around one, or a hybrid of such layers and linear ones (LFM2).
        session: a session over a stream of this model's spec; see `rotation_of` and `spec_of`.

    Raises:
        ConfigError: the model's attention cannot be attached, or it is attached already; the message names the part.
            A hybrid model, and no state was saved at the stream's end.
        SpecMismatchError: another model wrote the stream.
    """
    decoder, layers = decoder_of(model), attention_modules(model)
    if any(hasattr(module, CAPTURE) for module in layers):
        raise ConfigError(f"{type(model).__name__} is attached already; leave that `with` block first")
    check_spec(session.view.header, spec_of(model))
    if session.view.rows != position_rows(model):
        raise ConfigError(
            f"{type(model).__name__} has positions of {position_rows(model)} rows, the session of {session.view.rows}; "
            "make the session with rows=position_rows(model)"
        )
    capture, attached = Capture(layers), Attached(model, session)
    with ExitStack() as undo:
        deltas = RopeDeltas(model)
        undo.callback(deltas.restore)
        for handle in (
            model.register_forward_pre_hook(_cache_hook(attached, deltas), with_kwargs=True),
            model.register_forward_hook(_deltas_hook(deltas), with_kwargs=True),
            decoder.register_forward_pre_hook(_decoder_hook(attached, capture), with_kwargs=True),
            decoder.register_forward_hook(capture.release, always_call=True),
            rotary_of(model).register_forward_pre_hook(capture.note_positions, with_kwargs=True),
        ):
            undo.callback(handle.remove)
        for layer, module in enumerate(layers):
            setattr(module, CAPTURE, capture)
            undo.callback(delattr, module, CAPTURE)
            for kind, store in (("q", capture.queries), ("k", capture.keys)):
                last = next(getattr(module, f"{kind}_{part}") for part in _LAST if hasattr(module, f"{kind}_{part}"))
                undo.callback(last.register_forward_hook(capture.keeper(store, layer)).remove)
        _answer_on_branches(attached, deltas, undo)
        _select_attention(model, undo)
        yield attached


def _select_attention(model: Model, undo: ExitStack) -> None:
    """Make the text decoder call `_attention`, and leave a vision tower as it is."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    config, text = model.config, model.config.get_text_config(decoder=True)
    part = next((name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is text), None)
    before = text._attn_implementation
    undo.callback(model.set_attn_implementation, before if part is None else {part: before})
    model.set_attn_implementation(_NAME if part is None else {part: _NAME})
    if text._attn_implementation != _NAME:
        raise ConfigError(f"{type(model).__name__}: its attention function cannot be replaced")


def _answer_on_branches(attached: Attached, deltas: RopeDeltas, undo: ExitStack) -> None:
    """Have `generate()` ask on a branch wherever it would have made a cache of its own."""
    model: Any = attached.model
    if not hasattr(model, "_prepare_cache_for_generation"):
        return  # a bare decoder: it does not generate
    prepare = model._prepare_cache_for_generation

    def prepare_branch(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        prepared = prepare(generation_config, model_kwargs, *args, **kwargs)
        if given is None and isinstance(model_kwargs.get("past_key_values"), DynamicCache):
            model_kwargs["past_key_values"] = attached.question()
        deltas.load(model_kwargs.get("past_key_values"))
        return prepared

    model._prepare_cache_for_generation = prepare_branch
    undo.callback(delattr, model, "_prepare_cache_for_generation")


def _inject(attached: Attached, kwargs: dict[str, Any]) -> None:
    uses_cache = kwargs.get("use_cache")
    if uses_cache is None:
        uses_cache = getattr(attached.model.config.get_text_config(decoder=True), "use_cache", True)
    if kwargs.get("past_key_values") is None and uses_cache:
        kwargs["past_key_values"] = attached.cache()


def _cache_hook(attached: Attached, deltas: RopeDeltas) -> Callable[..., Any]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _inject(attached, kwargs)
        if kwargs.get("position_ids") is None:
            deltas.load(kwargs.get("past_key_values"))
        return args, kwargs

    return hook


def _deltas_hook(deltas: RopeDeltas) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        deltas.save(kwargs.get("past_key_values"))

    return hook


def _decoder_hook(attached: Attached, capture: Capture) -> Callable[..., Any]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _inject(attached, kwargs)
        cache = kwargs.get("past_key_values")
        capture.clear()
        ids, embeddings = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = embeddings if ids is None else ids
        if isinstance(cache, TierCache) and tokens is not None:  # without tokens, the engine says what it misses
            cache.prepare(tokens)
            capture.cache, branch = cache, cache.branch
            if branch is None:
                capture.ids = content_ids(ids, embeddings, kwargs.get("position_ids"))
                if cache.states is not None:
                    cache.states.begin(cache.num_tokens)
                return args, kwargs
            if branch.needs_recall:
                with cache.recalling():
                    module.forward(*args, **kwargs)
            attached.last = branch.recall
        return args, kwargs

    return hook
