# SPDX-License-Identifier: Apache-2.0
"""Questions under a budget: logits against a dense oracle that sees the selected blocks at the placed positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.engines.transformers import Attached
from kvstore.session.branch import Branch
from kvstore.store import Access, Entry, FetchRequest
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

STREAM = token_ids(160)
PROMPT = token_ids(11, seed=5)
WINDOW = 24


@dataclass
class Choices:
    """What a branch chose, by layer; the last choice counts."""

    by_layer: dict[int, list[int]] = field(default_factory=dict)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Choices:
    """Record what `Branch` attends to."""
    seen = Choices()
    attend_to = Branch._attend_to

    def recording(
        self: Branch, attending: Any, chosen: list[Entry], near: list[Entry], layers: range
    ) -> frozenset[int]:
        if attending is self:
            blocks = {entry.index for entry in (*self._sinks, *chosen, *near)}
            assert len(blocks) == len(self._sinks) + len(chosen) + len(near)
            for layer in layers:
                seen.by_layer[layer] = sorted(blocks)
        return attend_to(self, attending, chosen, near, layers)

    monkeypatch.setattr(Branch, "_attend_to", recording)
    return seen


def stored(attached: Attached, index: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[kv_heads, tokens, dim]` of a block, from the store."""
    view, layout = attached.session.view, attached.session.view.layout
    entry = view.entries[index]
    slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    view.store.fetch([FetchRequest(entry.key, slot, None)])
    return layout.keys(slot)[layer, :, : entry.num_tokens], layout.values(slot)[layer, :, : entry.num_tokens]


def oracle(attached: Attached, choices: Choices, ids: Tensor, *, num_near: int, far: int | None) -> Tensor:
    """Logits of a prompt that sees the chosen blocks only.

    Args:
        attached: the stream.
        choices: blocks by layer.
        ids: [1, tokens].
        num_near: how many of the last chosen tokens are the recent window.
        far: the one distance of everything else; None closes the past up and rotates it.
    """
    model: Any = attached.model
    rotate = attached.session.view.rotate
    assert rotate is not None
    hidden = model.model.embed_tokens(ids)
    tokens = ids.shape[1]
    end = attached.session.num_tokens
    for number, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            getattr(layer.self_attn, name)(normed).view(1, tokens, -1, 16).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        parts = [stored(attached, index, number) for index in choices.by_layer[number]]
        past_key = torch.cat([part for part, _ in parts], dim=1)[None]
        past_value = torch.cat([part for _, part in parts], dim=1)[None]
        num_past = past_key.shape[2]
        num_far = num_past - num_near
        start = num_past if far is None else end
        places = torch.arange(start, start + tokens)[None, None]
        if far is None:
            past = rotate(past_key, torch.arange(num_past)[None, None])
            logits_past = grouped(rotate(query, places), past)
        else:
            near = rotate(past_key[:, :, num_far:], torch.arange(end - num_near, end)[None, None])
            constant = rotate(query, torch.full((1, 1, tokens), far))
            logits_past = torch.cat(
                [grouped(constant, past_key[:, :, :num_far]), grouped(rotate(query, places), near)], dim=-1
            )
        logits_new = grouped(rotate(query, places), rotate(key, places))
        logits_new = logits_new.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), float("-inf"))
        weights = (torch.cat([logits_past, logits_new], dim=-1) / 4.0).softmax(dim=-1)
        values = torch.cat([past_value, value], dim=2).repeat_interleave(2, 1)
        out = (weights @ values).transpose(1, 2).reshape(1, tokens, -1)
        hidden = hidden + layer.self_attn.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits


def grouped(query: Tensor, key: Tensor) -> Tensor:
    """Products of 4 query heads with 2 KV heads."""
    return query @ key.repeat_interleave(2, 1).transpose(-1, -2)


@pytest.mark.parametrize("name", ["maxsim", "rekv", "infllm", "streaming_llm"])
@pytest.mark.parametrize("access", [Access.WRITE, Access.READ])
def test_answer_equals_the_dense_oracle(name: str, access: Access, choices: Choices, tmp_path: Path) -> None:
    model = make_model()
    recent = 0 if name in ("maxsim", "rekv") else 16
    config = settings(policy(name, recent_tokens=recent), window=WINDOW, sinks=4, budget=4 * BLOCK_TOKENS)
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
    expected = 1 + recent // BLOCK_TOKENS + (0 if name == "streaming_llm" else 4)
    assert {len(blocks) for blocks in choices.by_layer.values()} == {expected}
    assert attached.last.num_attended_tokens == expected * BLOCK_TOKENS
    if name in ("rekv", "infllm"):
        assert len({tuple(blocks) for blocks in choices.by_layer.values()}) > 1, "layers choose for themselves"
    token = PROMPT[:, :1]
    whole = torch.cat([PROMPT, token], dim=1)
    before = {layer: list(blocks) for layer, blocks in choices.by_layer.items()}
    step = attached.model(token, past_key_values=cache).logits
    if name == "infllm" and choices.by_layer != before:
        return  # it chose again; the prompt's own hidden states came from the first choice
    wanted = oracle(attached, choices, whole, num_near=recent, far=far)[:, -1:]
    assert torch.allclose(step, wanted, atol=1e-4, rtol=1e-4)


def test_the_oracle_tells_selections_apart(choices: Choices, tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(policy("maxsim"), window=WINDOW, sinks=4, budget=16)) as attached:
        model(STREAM)
        attached.session.commit()
        had = model(PROMPT, past_key_values=attached.question()).logits
        chosen = choices.by_layer[0]
        other = [block for block in range(1, 20) if block not in chosen][: len(chosen) - 1]
        choices.by_layer = {layer: [0, *other] for layer in range(3)}
        assert (had - oracle(attached, choices, PROMPT, num_near=0, far=None)).abs().max() > 0.05


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
        assert torch.allclose(had, oracle(attached, choices, PROMPT, num_near=0, far=None), atol=1e-4, rtol=1e-4)


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
            assert set(pinned) == {kept[0], *kept[attached.session._window_first :]}
    # Nothing lies beyond the window at first, so both see the same.
    assert torch.equal(answers[0][0], answers[1][0])
    assert (answers[0][-1] - answers[1][-1]).abs().max() > 0.01
