# SPDX-License-Identifier: Apache-2.0
"""Turns of a conversation: replies read the stream's end and what was brought back, and both sides are appended."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.engines import attached as attached_module
from kvstore.errors import ConfigError, ShapeError
from kvstore.retrieval.positions import PositionPolicy
from tests.tiny_models import ALL, ORIGINAL, attached_stream, make_model, policy, settings, token_ids

TURNS = [token_ids(count, seed) for seed, count in enumerate((13, 1, 30), start=1)]
NEW = 5


def plain_replies(model: Any) -> list[Tensor]:
    """What the model says when all that was said stands in its prompt."""
    said = torch.empty(1, 0, dtype=torch.int64)
    replies = []
    for turn in TURNS:
        prompt = torch.cat([said, turn], dim=1)
        said = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
        replies.append(said[:, prompt.shape[1] :])
    return replies


def test_replies_are_those_of_the_whole_conversation(tmp_path: Path) -> None:
    model = make_model()
    expected = plain_replies(model)
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        replies = [attached.reply(turn, max_new_tokens=NEW, do_sample=False) for turn in TURNS]
        assert attached.session.num_tokens == sum(turn.shape[1] + NEW for turn in TURNS)
    assert [reply.tolist() for reply in replies] == [reply.tolist() for reply in expected]


@pytest.mark.parametrize("name", ["maxsim", "rekv", "auto", "streaming_llm"])
def test_a_reply_reads_the_window_whatever_the_policy_has(name: str, tmp_path: Path) -> None:
    model = make_model()
    rule = policy(name, recent_tokens=0, position=PositionPolicy.ORIGINAL, beyond=None)
    window, sinks = 32, 8
    with attached_stream(tmp_path, model, settings(rule, window=window, sinks=sinks, budget=16)) as attached:
        model(token_ids(120))
        attached.reply(token_ids(9, seed=5), max_new_tokens=2, do_sample=False)
        had = attached.last.num_attended_tokens
        brought = 16 if rule.retrieves else 0
        assert had >= sinks + window + brought
        assert attached.session.num_tokens == 120 + 9 + 2


def test_what_is_stored_does_not_depend_on_what_was_brought_back(tmp_path: Path) -> None:
    model = make_model()
    keys = []
    for name in ("maxsim", "streaming_llm"):
        with attached_stream(tmp_path / name, model, settings(policy(name), window=16, budget=16)) as attached:
            model(token_ids(100))
            for _ in range(2):
                reply = attached.reply(token_ids(9, seed=5), max_new_tokens=1, do_sample=False)
                attached.session.drop(1)  # replies may differ; what surrounds them is compared
                model(torch.ones_like(reply))
            attached.session.commit(partial=True)
            keys.append([entry.key for entry in attached.session.view.entries])
    assert keys[0] == keys[1]


def test_turns_that_cannot_be_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with attached_stream(tmp_path, make_model(), settings(policy("maxsim"), window=ALL)) as attached:
        for wrong in (torch.ones(2, 3, dtype=torch.int64), torch.empty(1, 0, dtype=torch.int64)):
            with pytest.raises(ShapeError, match="a turn is"):
                attached.reply(wrong, max_new_tokens=1)
        with pytest.raises(ConfigError, match="recent_tokens"):
            attached.question(recent_tokens=-1)
        assert attached.session.num_tokens == 0


@pytest.mark.parametrize("name", ["maxsim", "rekv", "auto", "infllm"])
def test_what_only_fills_a_pass_up_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    rule = policy(name, beyond=None, full_layers=0)
    found = []
    for step in (1, 16):
        monkeypatch.setattr(attached_module, "_SHORT_STEP", step)
        with attached_stream(tmp_path / str(step), model, settings(rule, window=32, budget=16)) as attached:
            model(token_ids(120))
            replies = [attached.reply(turn, max_new_tokens=NEW, do_sample=False).tolist() for turn in TURNS]
            attached.question(TURNS[0])
            spans = [(span.first_token, span.score) for span in attached.last.spans]
            found.append(
                (
                    replies,
                    attached.session.num_tokens,
                    [entry.num_tokens for entry in attached.session.view.entries],
                    spans,
                )
            )
    assert found[0][:3] == found[1][:3]
    assert [place for place, _ in found[0][3]] == [place for place, _ in found[1][3]]
    assert [score for _, score in found[0][3]] == pytest.approx([score for _, score in found[1][3]], rel=1e-4)


def test_a_turn_that_is_interrupted_leaves_nothing_that_only_filled_it_up(tmp_path: Path) -> None:
    model = make_model()
    for layer in range(3):
        with attached_stream(tmp_path / str(layer), model, settings(policy("maxsim"), window=32)) as attached:
            model(token_ids(20))
            handle = model.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                attached.reply(TURNS[0], max_new_tokens=1)
            handle.remove()
            attached.session.commit(partial=True)
            stored = TURNS[0].shape[1] - 1 if layer == 2 else 0  # all layers have taken the forward in
            assert attached.session.num_tokens == 20 + stored


def interrupt(*_: object) -> None:
    """As a user does."""
    raise KeyboardInterrupt


def test_what_is_searched_within_the_trained_length_goes_when_the_stream_is_longer(tmp_path: Path) -> None:
    model = make_model()
    config = replace(settings(policy("auto"), window=32, budget=16), trained_tokens=100)
    with attached_stream(tmp_path, model, config) as attached:
        view = attached.session.view
        model(token_ids(90))
        attached.question(TURNS[0])
        memory = weakref.ref(view.search(view.policy))
        assert memory() is not None
        model(token_ids(20))
        attached.question(TURNS[0])
        gc.collect()
        assert view.policy.name == "maxsim"
        assert memory() is None


@pytest.mark.parametrize("name", ["maxsim", "rekv", "auto", "streaming_llm"])
def test_what_a_question_holds_goes_with_its_cache(name: str, tmp_path: Path) -> None:
    """A chat asks every few seconds; what waited for the garbage collector took a hundred megabytes a turn."""
    model: Any = make_model()
    with attached_stream(tmp_path, model, settings(policy(name), window=32, budget=16)) as attached:
        model(token_ids(90))
        gc.collect()
        gc.disable()
        try:
            cache = attached.question(TURNS[0])
            assert cache.branch is not None
            branch = weakref.ref(cache.branch)
            model.generate(TURNS[0], past_key_values=cache, max_new_tokens=2, do_sample=False)
            del cache
            assert branch() is None
        finally:
            gc.enable()
