# SPDX-License-Identifier: Apache-2.0
"""What a question leaves behind while its layers choose: nothing that was interrupted, and no graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.engines.tier_cache import TierCache
from kvstore.engines.transformers import Attached
from kvstore.retrieval.triggers.trigger import EveryStep, OncePerQuestion, Trigger
from kvstore.session.branch import Branch
from kvstore.session.choosing import LayerChoices
from kvstore.session.view import SessionConfig
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

PROMPTS = [token_ids(5, seed=seed) for seed in (7, 8)]


def config(name: str, trigger: Trigger) -> SessionConfig:
    """Little of the stream is read, in every layer by its own choice."""
    rule = policy(name, trigger=trigger, full_layers=0, recent_tokens=8, beyond=None)
    return settings(rule, window=24, sinks=4, budget=4 * BLOCK_TOKENS)


def ask(attached: Attached, cache: TierCache, ids: Tensor) -> Tensor:
    """Logits of a part of the question."""
    model: Any = attached.model
    logits: Tensor = model(ids, past_key_values=cache).logits
    return logits


def interrupted(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let the coming call of that number of a method of branches be interrupted."""
    method, seen = getattr(Branch, name), []

    def failing(self: Branch, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == number:
            raise KeyboardInterrupt
        return method(self, *args, **kwargs)

    monkeypatch.setattr(Branch, name, failing)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_choice_that_was_not_read_is_made_again(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with attached_stream(tmp_path, make_model(), config("auto", EveryStep())) as attached:
        attached.model(token_ids(163))
        found = []
        for is_interrupted in (False, True):
            cache = attached.question()
            ask(attached, cache, PROMPTS[0])
            if is_interrupted:
                with monkeypatch.context() as patch:
                    interrupted(patch, "_reading", number)
                    with pytest.raises(KeyboardInterrupt):
                        ask(attached, cache, PROMPTS[1][:, :1])
            found.append(ask(attached, cache, PROMPTS[1][:, :1]))
    torch.testing.assert_close(found[1], found[0])


def test_a_prompt_that_fails_in_the_last_layer_has_asked_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attached_stream(tmp_path, make_model(), config("auto", OncePerQuestion())) as attached:
        attached.model(token_ids(163))
        expected = ask(attached, attached.question(), PROMPTS[1])
        cache = attached.question()
        with monkeypatch.context() as patch:
            interrupted(patch, "inputs", 3)
            with pytest.raises(KeyboardInterrupt):
                ask(attached, cache, PROMPTS[0])
        torch.testing.assert_close(ask(attached, cache, PROMPTS[1]), expected)


@pytest.mark.parametrize("name", ["streamkv", "maxsim"])
def test_a_pass_over_the_question_that_fails_behind_its_last_layer_is_needed_again(name: str, tmp_path: Path) -> None:
    with attached_stream(tmp_path, make_model(), config(name, OncePerQuestion())) as attached:
        attached.model(token_ids(163))
        cache = attached.question()
        assert cache.branch is not None

        def stopped() -> None:
            with cache.recalling():
                ask(attached, cache, PROMPTS[0])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert cache.branch.needs_recall
        assert cache.branch.num_tokens == 0


@pytest.mark.parametrize("name", ["auto", "maxsim", "streamkv"])
def test_a_question_asked_with_gradients_is_answered_and_holds_none(name: str, tmp_path: Path) -> None:
    with attached_stream(tmp_path, make_model(), config(name, OncePerQuestion())) as attached, torch.enable_grad():
        attached.model(token_ids(163))
        cache = attached.question()
        ask(attached, cache, PROMPTS[0])
        assert attached.last.spans
        choices = cache.branch._choices if cache.branch is not None else None
        for asked_by in (state.asked_by for state in choices._layers) if choices is not None else ():
            assert asked_by is not None
            assert not asked_by.requires_grad
            assert asked_by.untyped_storage().nbytes() == asked_by.nbytes, "of the newest token, not of all"


def test_a_layer_that_has_room_for_everything_by_now_shares_no_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = policy("streamkv", full_layers=1)
    with attached_stream(tmp_path, make_model(), settings(rule, window=24, sinks=4, budget=16)) as attached:
        attached.model(token_ids(163))
        cache = attached.question()
        assert cache.branch is not None
        seen = []
        for fits in (False, True):
            monkeypatch.setattr(LayerChoices, "_fits", lambda _, fits=fits: fits)
            with cache.recalling():
                ask(attached, cache, PROMPTS[0])
            seen.append(cache.branch.contexts[0].num_past)
        assert seen[0] < seen[1] == 163
