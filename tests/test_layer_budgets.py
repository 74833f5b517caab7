# SPDX-License-Identifier: Apache-2.0
"""One budget for all layers: what moves between them, what stays the same, and what the model then computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.errors import ConfigError
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.selectors.adaptive import Adaptive
from kvstore.retrieval.selectors.budget import TokenBudget
from kvstore.retrieval.selectors.layers import AcrossLayers
from kvstore.retrieval.triggers.trigger import EveryStep, OncePerQuestion
from kvstore.session.view import SessionConfig
from kvstore.store import Access
from tests.session_oracle import Choices, oracle, record
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

STREAM, PROMPT = token_ids(160), token_ids(11, seed=5)
BUDGET = 4 * BLOCK_TOKENS


def sharing(full_layers: int) -> SessionConfig:
    """Small pages of one budget."""
    rule = policy("quest", segmenter=Pages(2), selector=AcrossLayers(), trigger=OncePerQuestion())
    rule = replace(rule, full_layers=full_layers, recent_tokens=16)
    return settings(rule, window=24, sinks=4, budget=BUDGET)


def test_layers_take_from_each_other_and_together_what_each_would_have_had() -> None:
    peaked = torch.tensor([[9.0, 0, 0, 0, 0, 0]])
    flat = torch.tensor([[3.0, 2.9, 2.8, 2.7, 2.6, -9.0]])
    sizes = torch.full((1, 6), 8)
    alone = [AcrossLayers().select(scores, sizes, 24) for scores in (peaked, flat)]
    shared = AcrossLayers().select_together([peaked, flat], [sizes, sizes], 24)
    assert [int(chosen.sum()) for chosen in alone] == [3, 3]
    assert [int(chosen.sum()) for chosen in shared] == [2, 4]
    assert torch.equal(torch.cat(shared), Adaptive().select(torch.cat([peaked, flat]), sizes.expand(2, -1), 24))


@pytest.mark.parametrize("inner", [Adaptive(), TokenBudget()])
def test_layers_may_be_cut_into_different_units(inner: Any) -> None:
    scores = [torch.randn(2, count, generator=torch.Generator().manual_seed(count)) for count in (0, 3, 7)]
    sizes = [torch.full(each.shape, 8) for each in scores]
    shared = AcrossLayers(inner).select_together(scores, sizes, 16)
    assert [each.shape for each in shared] == [each.shape for each in scores]
    assert sum(int(each.sum()) for each in shared) * 8 <= 6 * 16
    assert AcrossLayers(inner).select_together([], [], 16) == []


@pytest.mark.parametrize("access", [Access.WRITE, Access.READ])
def test_a_session_moves_budgets_between_layers_and_keeps_their_sum(
    access: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, choices = make_model(), record(monkeypatch)
    config = sharing(full_layers=0)
    with attached_stream(tmp_path, model, config) as attached:
        model(STREAM)
        attached.session.commit()
        attached.session.flush()
    with attached_stream(tmp_path, model, config, access) as attached:
        for asked in (None, token_ids(4, seed=9)):  # the prompt itself is passed over, or the bare question
            cache = attached.question(asked)
            before = Choices(dict(choices.by_layer))
            had = model(PROMPT, past_key_values=cache).logits
            if asked is not None:
                assert choices.by_layer == before.by_layer, "it is chosen once"
            assert torch.allclose(had, oracle(attached, choices, PROMPT, num_near=16), atol=1e-4, rtol=1e-4)
            of_layers = [sum(map(len, choices.by_layer[layer])) for layer in range(3)]
            assert sum(of_layers) == 6 * (BLOCK_TOKENS + BUDGET + 16)
            assert len(set(of_layers)) > 1, "layers read as they need"
        assert attached.last.spans
        assert {place.pins for place in attached.session.view.residency._places.values()} <= {0, 1}


def test_layers_that_read_everything_neither_give_nor_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, choices = make_model(), record(monkeypatch)
    config = sharing(full_layers=1)
    with attached_stream(tmp_path, model, config) as attached:
        model(STREAM)
        had = model(PROMPT, past_key_values=attached.question()).logits
        assert torch.allclose(had, oracle(attached, choices, PROMPT, num_near=16), atol=1e-4, rtol=1e-4)
        assert [len(tokens) for tokens in choices.by_layer[0]] == [160, 160]
        assert sum(len(t) for layer in (1, 2) for t in choices.by_layer[layer]) == 4 * (BLOCK_TOKENS + BUDGET + 16)


def test_what_would_share_without_a_pass_over_the_question_is_refused() -> None:
    with pytest.raises(ConfigError, match="one budget for all layers"):
        policy("quest", selector=AcrossLayers(), trigger=EveryStep())
    with pytest.raises(ConfigError, match="one budget for all layers"):
        policy("rekv", selector=AcrossLayers(), retrieves_while_appending=True)
