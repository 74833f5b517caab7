# SPDX-License-Identifier: Apache-2.0
"""Next-token distributions made in parts: they are the model's own, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedConfig,
)

from kvstore.engines.next_token import NextToken
from kvstore.engines.past import continue_run, read_run, states_behind
from kvstore.errors import CalibrationError
from tests.tiny_models import SIZES, VOCABULARY, build, make_model, token_ids


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5000])
def test_distributions_made_in_parts_are_the_models_own(family: str, vocabulary: int) -> None:
    model = make_model(family, vocab_size=vocabulary)
    run = read_run(model, token_ids(40), token_ids(8, 3))
    with torch.no_grad():
        wanted = continue_run(model, run.keys, run.values, run.continuation)
        states = states_behind(model, run.keys, run.values, run.continuation)
        found = NextToken(model).logs(states)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=8.0)),
        (CohereForCausalLM, CohereConfig(**SIZES)),
    ],
    ids=["divided", "multiplied"],
)
def test_scaled_logits_are_scaled(model_class: Any, config: PreTrainedConfig) -> None:
    model = build(model_class, config)
    run = read_run(model, token_ids(40), token_ids(8, 3))
    with torch.no_grad():
        wanted = continue_run(model, run.keys, run.values, run.continuation)
        found = NextToken(model).logs(states_behind(model, run.keys, run.values, run.continuation))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_roundings_of_a_narrow_model_hardly_change_the_scale() -> None:
    model = build(GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=3.0), torch.bfloat16)
    states = 8 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    narrow = NextToken(model).logs(states)
    wide = NextToken(model.float()).logs(states)
    assert 0 < float((narrow - wide).abs().max()) < 2e-3 * float(wide.abs().max())


def test_logits_that_are_no_multiple_of_the_tables_are_refused() -> None:
    model = build(Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=5.0))
    with pytest.raises(CalibrationError, match=r"Gemma2.*multiple"):
        NextToken(model)


def test_the_gradient_of_a_label_is_what_autograd_finds() -> None:
    model = make_model(vocab_size=5000)
    states = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 4095, 4096, 4999, 7])
    logs = model.lm_head(states).log_softmax(-1)
    (wanted,) = torch.autograd.grad(logs.gather(1, labels[:, None]).sum(), states)
    next_token = NextToken(model)
    found = next_token.gradient(next_token.logs(states.detach()), labels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
