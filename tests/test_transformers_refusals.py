# SPDX-License-Identifier: Apache-2.0
"""Models that cannot be attached are refused with a reason; close relatives of known ones are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from kvstore.engines.anatomy import attention_modules, rotation_of, spec_of
from kvstore.errors import ConfigError
from tests.tiny_models import ORIGINAL, SIZES, attached_stream, build, feed, make_model, settings, token_ids

IDS = token_ids(40)


def config(config_class: Any, **changes: Any) -> Any:
    """A tiny config of a family."""
    return config_class(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("model_class", "made", "reason"),
    [
        (MistralForCausalLM, config(MistralConfig, sliding_window=16), "whole past"),
        (
            Qwen2ForCausalLM,
            config(Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1),
            "layer 1 .*whole past",
        ),
        (Gemma3ForCausalLM, config(Gemma3TextConfig, head_dim=16), "whole past"),
        (GPTNeoXForCausalLM, config(GPTNeoXConfig), "q_proj, k_proj and v_proj"),
        (Phi3ForCausalLM, config(Phi3Config), "q_proj, k_proj and v_proj"),
        (GPT2LMHeadModel, config(GPT2Config, n_embd=64, n_head=4, n_layer=2), "0 decoders"),
        (GlmForCausalLM, config(GlmConfig, head_dim=16), "rotary form|rotate"),
        (PhiForCausalLM, config(PhiConfig, partial_rotary_factor=0.5), "rotary form|rotate"),
        (SmolLM3ForCausalLM, config(SmolLM3Config, no_rope_layers=[1, 0, 1]), "layer 1 has no rotary"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_would_answer_wrongly_are_refused(model_class: Any, made: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        rotation_of(build(model_class, made))


def test_what_only_a_forward_shows_is_refused_there(tmp_path: Path) -> None:
    model = build(HunYuanDenseV1ForCausalLM, config(HunYuanDenseV1Config, head_dim=16))  # norms after RoPE
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        for cache in (attached.cache(), attached.question()):
            with pytest.raises(ConfigError, match="in another way than RoPE"):
                model(IDS, past_key_values=cache)
        assert attached.session.num_tokens == 0
        attached.session.commit(partial=True)
        assert attached.session.view.entries == []


@pytest.mark.parametrize(
    ("model_class", "made"),
    [
        (CohereForCausalLM, config(CohereConfig)),  # rotates interleaved pairs, with functions of its own
        (GraniteForCausalLM, config(GraniteConfig, attention_multiplier=0.1)),
        (OlmoForCausalLM, config(OlmoConfig, clip_qkv=0.5)),  # cuts its projections off where they lie
        (Olmo2ForCausalLM, config(Olmo2Config)),  # norms over all heads before RoPE
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_relatives_that_fit_are_exact(model_class: Any, made: Any, tmp_path: Path) -> None:
    model = build(model_class, made)
    with torch.no_grad():
        expected = feed(model, IDS, (9, 17, 14), past_key_values=DynamicCache())
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        had = [*feed(model, IDS[:, :26], (9, 17)), model(IDS[:, 26:], past_key_values=attached.question()).logits]
    assert all(torch.equal(a, b) for a, b in zip(had, expected, strict=True))


def test_two_decoders_are_one_too_many() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = make_model(), make_model()

    with pytest.raises(ConfigError, match="2 decoders"):
        attention_modules(Pair())


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="float64"):
        spec_of(make_model(dtype=torch.float64))


def test_fine_tunes_of_one_shape_have_different_specs() -> None:
    one, other = make_model(), make_model()
    assert spec_of(one) == spec_of(other)
    last: Any = attention_modules(other)[-1]
    with torch.no_grad():
        last.v_proj.weight[0, 0] += 1
    assert spec_of(one).fingerprint != spec_of(other).fingerprint


def test_attention_outside_the_interface_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that attends by itself would see the new tokens only."""

    def alone(self: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        for part in (self.q_proj, self.k_proj):
            part(hidden_states)
        return self.o_proj(self.v_proj(hidden_states).repeat(1, 1, 2)), None

    model = build(MistralForCausalLM, config(MistralConfig, sliding_window=None))
    llama = make_model()
    assert isinstance(llama.config, LlamaConfig)
    monkeypatch.setattr(LlamaAttention, "forward", alone)
    with attached_stream(tmp_path / "llama", llama, settings(ORIGINAL)), pytest.raises(ConfigError, match="ignores"):
        llama(IDS)
    with attached_stream(tmp_path / "mistral", model, settings(ORIGINAL)):
        assert model(IDS).logits.shape[1] == 40
