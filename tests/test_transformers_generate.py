# SPDX-License-Identifier: Apache-2.0
"""`model.generate()` works unchanged inside `attach`, and the model leaves the block as it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvstore.errors import ConfigError, ShapeError
from kvstore.retrieval.positions import PositionPolicy
from tests.tiny_models import ALL, ORIGINAL, attached_stream, make_model, policy, settings, token_ids

STREAM = token_ids(37)
PROMPT = token_ids(9, seed=2)
WHOLE = torch.cat([STREAM, PROMPT], dim=1)
NEW = 8
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 50, "temperature": 1.5},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam_returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "returned": {"do_sample": True, "num_return_sequences": 3},
    "prompt_lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked": {"do_sample": False, "prefill_chunk_size": 4},
}


def generate(model: PreTrainedModel, ids: Tensor, **how: Any) -> Tensor:
    """New tokens only, seeded."""
    torch.manual_seed(7)
    answer: Any = model.generate(ids, max_new_tokens=NEW, **how)  # type: ignore[operator]
    tokens: Tensor = answer[:, ids.shape[1] :]
    return tokens


def hooks_of(model: nn.Module) -> list[int]:
    """Number of hooks of every module."""
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]


@pytest.mark.parametrize("way", WAYS)
def test_generate_answers_as_with_the_whole_context(way: str, tmp_path: Path) -> None:
    model = make_model()
    expected = generate(model, WHOLE, **WAYS[way])
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        model(STREAM)
        had = generate(model, PROMPT, **WAYS[way])
        assert attached.session.num_tokens == STREAM.shape[1]
    assert torch.equal(had, expected)


@pytest.mark.parametrize("name", ["maxsim", "rekv", "infllm", "streaming_llm"])
@pytest.mark.parametrize("way", ["greedy", "beam", "returned", "prompt_lookup"])
def test_every_policy_generates(way: str, name: str, tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(policy(name), window=16, budget=16)) as attached:
        model(token_ids(120))
        first = generate(model, PROMPT, **WAYS[way])
        assert torch.equal(first, generate(model, PROMPT, **WAYS[way]))
        assert attached.last.num_attended_tokens > 0


def test_left_padded_batch_equals_the_engines(tmp_path: Path) -> None:
    model = make_model()
    rows = torch.cat([PROMPT, PROMPT])
    mask = torch.ones_like(rows)
    rule = policy("streaming_llm", position=PositionPolicy.ORIGINAL, recent_tokens=ALL)
    rows[1, :4] = 0
    mask[1, :4] = 0
    expected = generate(model, rows, attention_mask=mask, do_sample=False)
    with attached_stream(tmp_path / "empty", model, settings(rule)):
        assert torch.equal(generate(model, rows, attention_mask=mask, do_sample=False), expected)
    alone = [generate(model, torch.cat([STREAM, row], dim=1), do_sample=False) for row in (PROMPT, PROMPT[:, 4:])]
    with attached_stream(tmp_path / "filled", model, settings(rule)):
        model(STREAM)
        had = generate(model, rows, attention_mask=mask, do_sample=False)
    assert torch.equal(had, torch.cat(alone))


def test_multi_turn_on_one_question_cache(tmp_path: Path) -> None:
    model = make_model()
    follow_up = token_ids(5, seed=4)
    first = generate(model, WHOLE, do_sample=False)
    expected = generate(model, torch.cat([WHOLE, first, follow_up], dim=1), do_sample=False)
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        model(STREAM)
        cache = attached.question()
        turn = torch.cat([PROMPT, generate(model, PROMPT, past_key_values=cache, do_sample=False), follow_up], dim=1)
        assert torch.equal(turn[:, PROMPT.shape[1] : -5], first)
        assert torch.equal(generate(model, turn, past_key_values=cache, do_sample=False), expected)


def test_beams_on_the_streams_own_cache_leave_it_alone(tmp_path: Path) -> None:
    model = make_model()
    expected = generate(model, WHOLE, do_sample=False, num_beams=3)
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        model(STREAM)
        had = generate(model, WHOLE, do_sample=False, num_beams=3, past_key_values=attached.cache())
        assert attached.session.num_tokens == STREAM.shape[1]
    assert torch.equal(had, expected)


def test_generating_into_the_stream_appends_and_crops(tmp_path: Path) -> None:
    model = make_model()
    expected = generate(model, WHOLE, do_sample=False)
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        model(STREAM)
        assert torch.equal(generate(model, WHOLE, do_sample=False, past_key_values=attached.cache()), expected)
        assert attached.session.num_tokens == WHOLE.shape[1] + NEW - 1
        attached.cache().crop(-3)  # of the block that is not full yet
        assert attached.session.num_tokens == WHOLE.shape[1] + NEW - 4
        with pytest.raises(ShapeError):  # transformers would read the whole stream again
            generate(model, WHOLE, past_key_values=attached.cache(), **WAYS["prompt_lookup"])


def test_a_recalled_question_goes_on_in_generate(tmp_path: Path) -> None:
    """`question` and `generate` need not run in the same autograd mode."""
    model = make_model()
    expected = generate(model, WHOLE, do_sample=False)
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        model(STREAM)
        with torch.inference_mode():
            cache = attached.question(PROMPT)
        assert torch.equal(generate(model, PROMPT, past_key_values=cache, do_sample=False), expected)


def test_foreign_caches_and_no_cache_are_left_alone(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        expected = model(PROMPT).logits
    greedy = generate(model, PROMPT, do_sample=False)
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        model(STREAM)
        own = DynamicCache(config=model.config)
        had = torch.cat([model(part, past_key_values=own).logits for part in PROMPT.split([4, 5], dim=1)], dim=1)
        assert torch.allclose(had, expected, atol=1e-5)
        assert own.get_seq_length() == PROMPT.shape[1]
        assert torch.equal(model(PROMPT, use_cache=False).logits, expected)
        assert torch.equal(generate(model, PROMPT, do_sample=False, past_key_values=DynamicCache()), greedy)
        assert torch.equal(generate(model, PROMPT, do_sample=False, use_cache=False), greedy)
        model.config.use_cache = False
        assert torch.equal(model(PROMPT).logits, expected)
        model.config.use_cache = True
        assert attached.session.num_tokens == STREAM.shape[1]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_model_is_as_before_afterwards(attention: str, fails: bool, tmp_path: Path) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    before, names = hooks_of(model), {name for part in model.modules() for name in vars(part)}
    expected = generate(model, PROMPT, do_sample=False)
    try:
        with attached_stream(tmp_path, model, settings(ORIGINAL)):
            model(STREAM)
            assert model.config._attn_implementation == "kvstore"
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert hooks_of(model) == before
    assert {name for part in model.modules() for name in vars(part)} == names
    assert model.config._attn_implementation == attention
    assert torch.equal(generate(model, PROMPT, do_sample=False), expected)


def test_a_failed_attach_leaves_no_trace(tmp_path: Path) -> None:
    model = make_model()
    before = hooks_of(model)
    with attached_stream(tmp_path / "one", model, settings(ORIGINAL)):
        inside = hooks_of(model)
        with (
            pytest.raises(ConfigError, match="attached already"),
            attached_stream(tmp_path / "two", model, settings(ORIGINAL)),
        ):
            pass
        assert hooks_of(model) == inside
        assert model(PROMPT).logits.shape[1] == PROMPT.shape[1]
    assert hooks_of(model) == before
