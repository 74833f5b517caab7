# SPDX-License-Identifier: Apache-2.0
"""Questions under a budget: logits against a dense oracle that sees the selected blocks at the placed positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstore.engines.transformers import Attached
from kvstore.retrieval.registry import policies
from kvstore.store import Access
from tests.session_oracle import Choices, oracle, record
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

STREAM = token_ids(160)
PROMPT = token_ids(11, seed=5)
WINDOW = 24
BUDGET = 4 * BLOCK_TOKENS


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Choices:
    """Record what `Branch` attends to."""
    return record(monkeypatch)


NOTHING = ("streaming_llm", "streaming_vlm")  # is retrieved
WHOLE = ("auto", "maxsim", *NOTHING)  # one list for all layers
SHARED = (*WHOLE, "rekv", "infllm", "livevlm", "ape")  # one list for all KV heads
ONCE = (*WHOLE, "rekv", "livevlm", "ape", "streamkv")


@pytest.mark.parametrize("name", sorted(policies()))
@pytest.mark.parametrize("access", [Access.WRITE, Access.READ])
def test_answer_equals_the_dense_oracle(name: str, access: Access, choices: Choices, tmp_path: Path) -> None:
    model = make_model()
    recent = 0 if name in ("auto", "maxsim", "rekv") else 16
    config = settings(policy(name, recent_tokens=recent, full_layers=0), window=WINDOW, sinks=4, budget=BUDGET)
    with attached_stream(tmp_path, model, config) as attached:
        for part in STREAM.split(40, dim=1):
            model(part)
        attached.session.commit()
        attached.session.view.store.flush()
        assert len(attached.session.view.entries) == 20
        if access is Access.WRITE:
            check(attached, choices, name, recent)
    if access is Access.READ:
        with attached_stream(tmp_path, model, config, Access.READ) as attached:
            check(attached, choices, name, recent)


def check(attached: Attached, choices: Choices, name: str, recent: int) -> None:
    """Ask and compare."""
    cache = attached.question()
    had = attached.model(PROMPT, past_key_values=cache).logits
    far = WINDOW if name == "infllm" else None
    assert torch.allclose(had, oracle(attached, choices, PROMPT, num_near=recent, far=far), atol=1e-4, rtol=1e-4)
    expected = BLOCK_TOKENS + recent + (0 if name in NOTHING else BUDGET)
    lengths = [len(tokens) for lists in choices.by_layer.values() for tokens in lists]
    assert sum(lengths) == 6 * expected
    if name != "streamkv":  # whose layers share a budget
        assert set(lengths) == {expected}
        assert attached.last.num_attended_tokens == expected
    distinct = {tuple(tokens) for lists in choices.by_layer.values() for tokens in lists}
    if name not in WHOLE:
        assert len(distinct) > 1, "layers choose for themselves"
    if name not in SHARED:
        assert len(distinct) > len(choices.by_layer), "KV heads choose for themselves"
    token = PROMPT[:, :1]
    whole = torch.cat([PROMPT, token], dim=1)
    before = dict(choices.by_layer)
    step = attached.model(token, past_key_values=cache).logits
    if choices.by_layer != before:
        assert name not in ONCE, "they choose once"
        return  # the prompt's own hidden states came from the first choice
    wanted = oracle(attached, choices, whole, num_near=recent, far=far)[:, -1:]
    assert torch.allclose(step, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["quest", "arkvale"])
def test_the_first_layers_may_attend_to_everything(name: str, choices: Choices, tmp_path: Path) -> None:
    model = make_model()
    config = settings(policy(name, recent_tokens=16, full_layers=2), window=WINDOW, sinks=4, budget=BUDGET)
    with attached_stream(tmp_path, model, config) as attached:
        model(STREAM)
        attached.session.commit()
        had = attached.model(PROMPT, past_key_values=attached.question()).logits
        assert torch.allclose(had, oracle(attached, choices, PROMPT, num_near=16), atol=1e-4, rtol=1e-4)
        assert [len(choices.by_layer[layer][0]) for layer in range(3)] == [160, 160, BLOCK_TOKENS + 16 + BUDGET]


def test_the_oracle_tells_selections_apart(choices: Choices, tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(policy("maxsim"), window=WINDOW, sinks=4, budget=16)) as attached:
        model(STREAM)
        attached.session.commit()
        had = model(PROMPT, past_key_values=attached.question()).logits
        chosen = choices.by_layer[0][0]
        other = [token for token in range(160) if token not in chosen][: len(chosen) - BLOCK_TOKENS]
        choices.by_layer = {layer: [[*range(BLOCK_TOKENS), *other]] * 2 for layer in range(3)}
        assert (had - oracle(attached, choices, PROMPT, num_near=0)).abs().max() > 0.05


def test_a_planted_question_finds_its_block(tmp_path: Path) -> None:
    model = make_model()
    planted = STREAM.clone()
    planted[:, 72:80] = token_ids(8, seed=42)
    question = planted[:, 72:80]
    with attached_stream(tmp_path, model, settings(policy("maxsim"), window=WINDOW, sinks=4, budget=16)) as attached:
        for number in range(20):
            attached.session.segment(8, 2.0 * number, 2.0 * number + 2, number)
        model(planted)
        attached.question(question)
        spans = attached.last.spans
    assert (spans[0].start_s, spans[0].end_s, spans[0].group, spans[0].first_token) == (18.0, 20.0, 9, 72)
    assert spans[0].is_attended
    assert len(spans) <= 8
    assert [span.score for span in spans] == sorted((span.score for span in spans), reverse=True)


def test_scores_do_not_depend_on_when_a_process_began_to_ask(tmp_path: Path) -> None:
    model, ids, question = make_model(), token_ids(12 * BLOCK_TOKENS), token_ids(7, seed=3)
    config = settings(policy("maxsim"), window=16, sinks=4, budget=24)
    seen = []
    with attached_stream(tmp_path, model, config) as attached:
        for number, part in enumerate(ids.split(BLOCK_TOKENS, dim=1)):
            attached.session.segment(BLOCK_TOKENS, float(number), number + 1.0, number)
            model(part)
            attached.question(question)
            seen = attached.last.spans
    with attached_stream(tmp_path, model, config, Access.READ) as attached:
        attached.question(question)
        assert attached.last.spans == seen
        assert len(seen) > 2


def test_a_recalled_question_serves_the_whole_answer(choices: Choices, tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(policy("rekv"), window=WINDOW, sinks=4, budget=16)) as attached:
        model(STREAM)
        attached.session.commit()
        cache = attached.question(token_ids(4, seed=77))
        before = dict(choices.by_layer)
        had = model(PROMPT, past_key_values=cache).logits
        assert choices.by_layer == before
        assert torch.allclose(had, oracle(attached, choices, PROMPT, num_near=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["maxsim", "infllm"])
def test_many_questions_leave_no_pin_and_no_memory(name: str, tmp_path: Path) -> None:
    model = make_model()
    config = settings(policy(name, recent_tokens=16), window=WINDOW, sinks=4, budget=24)
    with attached_stream(tmp_path, model, config) as attached:
        model(STREAM)
        attached.session.commit()
        attached.session.view.store.flush()
    with attached_stream(tmp_path, model, config, Access.READ) as attached:
        residency = attached.session.view.residency
        for seed in range(12):
            cache = attached.question(token_ids(4, seed=seed))
            model(token_ids(6, seed=seed), past_key_values=cache)
            model(token_ids(1, seed=seed), past_key_values=cache)
            assert {place.pins for place in residency._places.values()} == {0}
            if seed == 5:
                attributes = [len(vars(part)) for part in model.modules()]
        assert sum(residency.pool._is_used) == len(residency._places) <= 20
        assert [len(vars(part)) for part in model.modules()] == attributes


def test_appended_forwards_retrieve_beyond_the_window(tmp_path: Path) -> None:
    """InfLLM: a forward far from a block sees it again, and unpins what it no longer needs."""
    model = make_model()
    wide = settings(policy("infllm"), window=WINDOW, sinks=4, budget=32)
    blind = settings(policy("infllm"), window=WINDOW, sinks=4, budget=0)
    answers = []
    for number, config in enumerate((wide, blind)):
        with attached_stream(tmp_path / str(number), model, config) as attached:
            answers.append([model(part).logits for part in STREAM.split(16, dim=1)])
            residency = attached.session.view.residency
            pinned = [key for key, place in residency._places.items() if place.pins]
            kept = [entry.key for entry in attached.session.view.entries]
            assert set(pinned) == {kept[0], *kept[attached.session._window._first :]}
    # Nothing lies beyond the window at first, so both see the same.
    assert torch.equal(answers[0][0], answers[1][0])
    assert (answers[0][-1] - answers[1][-1]).abs().max() > 0.01
