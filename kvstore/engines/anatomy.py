# SPDX-License-Identifier: Apache-2.0
"""Finds, by duck typing, the parts of a model that the adapter hooks: decoder, attention modules, rotation, spec."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from kvstore.errors import ConfigError
from kvstore.retrieval.tokens import Rotate
from kvstore.spec import ModelSpec

_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_MOVING_ROPE = ("dynamic", "longrope")
_LINEAR = ("linear_attention", "conv")
_SAMPLE_ROWS = 64
_KNOWN_ANGLES = 8


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder: the module that owns the decoder layers and the rotary embedding.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = [
        module
        for module in model.modules()
        if hasattr(module, "rotary_emb") and isinstance(getattr(module, "layers", None), nn.ModuleList)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{type(model).__name__}: {len(found)} decoders with rotary embeddings; exactly one is needed"
        )
    return found[0]


def rotary_of(model: nn.Module) -> nn.Module:
    """The decoder's rotary embedding."""
    rotary = decoder_of(model).rotary_emb
    assert isinstance(rotary, nn.Module), "decoder_of found it"
    return rotary


def linear_layers(model: nn.Module) -> list[int]:
    """Layers of a hybrid model that keep a state and no keys and values: linear attention, short convolutions."""
    types = getattr(_text_config(model), "layer_types", None) or []
    blocks: Any = decoder_of(model).layers
    pairs = enumerate(zip(types, blocks, strict=False))
    return [layer for layer, (kind, block) in pairs if kind in _LINEAR and not hasattr(block, "self_attn")]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The decoder's attention modules in order of layers; those of `linear_layers` have none.

    Raises:
        ConfigError: a layer's attention is missing, has fused projections, has no RoPE, or does not see the whole past.
    """
    name = type(model).__name__
    decoder, config = decoder_of(model), _text_config(model)
    # Families without a type per layer pass the window to the mask only: no module knows of it.
    slides = not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None)
    modules = []
    linear = linear_layers(model)
    for layer, block in enumerate(decoder.layers):  # type: ignore[arg-type]
        if layer in linear:
            continue
        attention = getattr(block, "self_attn", None)
        if attention is None or not all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj")):
            raise ConfigError(f"{name}: layer {layer} has no self_attn with q_proj, k_proj and v_proj")
        if not getattr(attention, "use_rope", True):
            raise ConfigError(f"{name}: layer {layer} has no rotary positions; its keys cannot be placed")
        if (
            slides
            or getattr(attention, "sliding_window", None)
            or getattr(block, "attention_type", "full_attention") != "full_attention"
        ):
            raise ConfigError(f"{name}: layer {layer} does not attend to the whole past; only full attention is stored")
        modules.append(attention)
    if not modules:
        raise ConfigError(f"{name}: no layer attends; there are no keys and values to store")
    return modules


def rotation_of(model: nn.Module) -> Rotate:
    """The model's own rotary function at any positions, bit for bit.

    Raises:
        ConfigError: the family rotates in a form other than NeoX halves over the whole head.
    """
    rotary: Any = rotary_of(model)
    attention = attention_modules(model)[0]
    module = sys.modules[type(attention).__module__]
    if getattr(rotary, "rope_type", "default") in _MOVING_ROPE:
        raise ConfigError(
            f"{type(model).__name__}: RoPE of type {rotary.rope_type!r} changes with the length, so that stored "
            "keys could not be rotated alike; use a model with fixed frequencies"
        )
    rotate_half = getattr(module, "rotate_half", None)
    apply = getattr(module, "apply_rotary_pos_emb", None)
    if rotate_half is None or apply is None:
        raise ConfigError(f"{type(model).__name__}: no rotary functions beside its attention")

    angles: list[tuple[Tensor, Tensor, Tensor]] = []  # (positions, cos, sin): all layers ask for the same few

    def angles_at(vectors: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        for place, (known, cos, sin) in enumerate(angles):
            if cos.dtype == vectors.dtype and cos.device == vectors.device and torch.equal(known, positions):
                if place:  # those that each layer asks for outlast those of one layer's past
                    angles.insert(0, angles.pop(place))
                return cos, sin
        # `forward`, not the call: the call runs the hook that watches the engine's own positions.
        cos, sin = rotary.forward(vectors, positions[0] if positions.shape[0] == 1 else positions)
        angles.insert(0, (positions.clone(), cos[:, None], sin[:, None]))
        del angles[_KNOWN_ANGLES:]
        return angles[0][1:]

    def rotate(vectors: Tensor, positions: Tensor) -> Tensor:
        cos, sin = angles_at(vectors, positions)
        rotated: Tensor = (vectors * cos) + (rotate_half(vectors) * sin)
        return rotated

    _check_rotation(model, rotary, apply, rotate, int(getattr(attention, "head_dim", 0)))
    return rotate


def position_rows(model: nn.Module) -> int:
    """Rows of a position: 3 for M-RoPE (time, height, width), else 1."""
    parameters = getattr(_text_config(model), "rope_parameters", None) or {}
    return 3 if "mrope_section" in parameters else 1


def spec_of(model: nn.Module) -> ModelSpec:
    """Read a loaded model's KV geometry and name its weights by samples of them.

    Raises:
        ConfigError: the model cannot be attached, or its dtype cannot be stored.
    """
    config = _text_config(model)
    modules = attention_modules(model)
    first: Any = modules[0]
    head_dim = int(first.head_dim)
    dtype = first.k_proj.weight.dtype
    if dtype not in _DTYPE_NAMES:
        raise ConfigError(f"{type(model).__name__}: weights are {dtype}; load it as bfloat16, float16 or float32")
    rope = getattr(config, "rope_parameters", None) or {}
    return ModelSpec(
        num_layers=len(modules),
        kv_heads=first.k_proj.out_features // head_dim,
        key_dim=head_dim,
        value_dim=first.v_proj.out_features // (first.k_proj.out_features // head_dim),
        dtype=_DTYPE_NAMES[dtype],
        key_space="pre",
        architecture=str(config.model_type),
        rope=json.dumps(rope, sort_keys=True, default=str, separators=(",", ":")),
        revision=_revision(modules),
    )


def trained_tokens_of(model: nn.Module) -> int:
    """Positions that the model was trained for; 0 when its config does not say."""
    return int(getattr(_text_config(model), "max_position_embeddings", 0) or 0)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _revision(modules: list[nn.Module]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for module in (modules[0], modules[len(modules) // 2], modules[-1]):
        for name in ("k_proj", "v_proj"):
            weight: Tensor = getattr(module, name).weight[:_SAMPLE_ROWS].detach().cpu().contiguous()
            digest.update(weight.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_rotation(model: nn.Module, rotary: Any, apply: Any, rotate: Rotate, head_dim: int) -> None:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 1, 4, head_dim, generator=generator).to(parameter.device, parameter.dtype)
    rows = position_rows(model)
    positions = torch.arange(4, device=parameter.device).expand(rows, 1, 4)
    try:
        cos, sin = rotary.forward(probe, positions[0] if rows == 1 else positions)
        wanted, _ = apply(probe, probe, cos, sin)
        matches = torch.equal(wanted, rotate(probe, positions))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{type(model).__name__}: its rotary form cannot be used: {error}") from error
    if not matches:
        raise ConfigError(f"{type(model).__name__}: it does not rotate in NeoX halves over the whole head")
