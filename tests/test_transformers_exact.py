# SPDX-License-Identifier: Apache-2.0
"""When everything is attended, a stream computes what the engine's own cache computes, bit for bit."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvstore.engines.transformers import attach
from kvstore.errors import ConfigError, ShapeError, SpecMismatchError
from kvstore.retrieval.positions import PositionPolicy
from kvstore.store import Access
from tests.tiny_models import (
    ALL,
    FAMILIES,
    ORIGINAL,
    attached_stream,
    feed,
    make_model,
    open_session,
    policy,
    settings,
    token_ids,
)

CHUNKS = (1, 7, 13, 1, 29, 5)
STREAM = sum(CHUNKS)
IDS = token_ids(STREAM + 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_stream_and_branch_equal_the_engines_cache(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(family, dtype)
    own = DynamicCache()
    with torch.no_grad():
        expected = feed(model, IDS, (*CHUNKS, 9, 1, 4), past_key_values=own)
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        appended = feed(model, IDS[:, :STREAM], CHUNKS)
        question = feed(model, IDS[:, STREAM:], (9, 1, 4), past_key_values=attached.question())
        assert attached.last.num_attended_tokens == STREAM
        attached.session.commit(partial=True)
        attached.session.view.store.flush()
    for had, wanted in zip((*appended, *question), expected, strict=True):
        assert torch.equal(had, wanted)
    with attached_stream(tmp_path, model, settings(ORIGINAL), Access.READ) as attached:
        cache = attached.question(IDS[:, STREAM : STREAM + 3])
        again = feed(model, IDS[:, STREAM:], (9, 1, 4), past_key_values=cache)
        assert attached.last.load.bytes_read["disk"] > 0
    for had, wanted in zip(again, expected[len(CHUNKS) :], strict=True):
        assert torch.equal(had, wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_consecutive_equals_original_when_nothing_is_left_out(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    answers = []
    for number, rule in enumerate((ORIGINAL, policy("maxsim"))):
        with attached_stream(tmp_path / str(number), model, settings(rule)) as attached:
            feed(model, IDS[:, :STREAM], CHUNKS)
            answers.append(model(IDS[:, STREAM:], past_key_values=attached.question()).logits)
    assert torch.equal(*answers)


def test_an_empty_stream_answers_like_the_bare_model(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        expected = model(IDS).logits
    for name in ("maxsim", "rekv", "infllm", "streaming_llm"):
        with attached_stream(tmp_path / name, model, settings(policy(name))) as attached:
            assert torch.equal(model(IDS, past_key_values=attached.question(IDS[:, :3])).logits, expected)
            assert attached.last.spans == []
            assert attached.last.num_attended_tokens == 0


def test_blocks_of_one_token_are_exact(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        expected = model(IDS[:, :20]).logits
    with attached_stream(tmp_path, model, settings(ORIGINAL, sinks=1)) as attached:
        for second in range(10):
            attached.session.segment(1, float(second), second + 1.0, second)
        feed(model, IDS[:, :10], (3, 7))
        attached.session.commit()
        assert [entry.num_tokens for entry in attached.session.view.entries] == [1] * 10
        had = model(IDS[:, 10:20], past_key_values=attached.question()).logits
    assert torch.equal(had, expected[:, 10:]) or torch.allclose(had, expected[:, 10:], atol=1e-5)


def test_a_question_does_not_change_what_is_appended_after_it(tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path / "plain", model, settings(ORIGINAL)):
        expected = feed(model, IDS[:, :STREAM], CHUNKS)
    with attached_stream(tmp_path / "asked", model, settings(ORIGINAL)) as attached:
        had = []
        for part in IDS[:, :STREAM].split(list(CHUNKS), dim=1):
            had.append(model(part).logits)
            model(token_ids(5, seed=9), past_key_values=attached.question(token_ids(4, seed=3)))
    assert all(torch.equal(a, b) for a, b in zip(had, expected, strict=True))


def test_an_answer_goes_on_while_the_stream_grows(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        whole = torch.cat([IDS[:, :20], IDS[:, 50:60]], dim=1)
        expected = feed(model, whole, (20, 5, 5), past_key_values=DynamicCache())
    with attached_stream(tmp_path, model, settings(ORIGINAL, window=16)) as attached:
        model(IDS[:, :20])  # one forward: the window does not show
        cache = attached.question()
        for _ in range(3):  # the open block of the question's past is closed and leaves the pool's window
            model(token_ids(16, seed=5))
        had = feed(model, IDS[:, 50:60], (5, 5), past_key_values=cache)
    assert torch.allclose(had[0], expected[1], atol=1e-5)
    assert torch.allclose(had[1], expected[2], atol=1e-5)


def test_batch_on_a_stream_branches_off_and_leaves_it_alone(tmp_path: Path) -> None:
    model = make_model()
    rule = policy("streaming_llm", position=PositionPolicy.ORIGINAL, recent_tokens=ALL)
    rows = torch.cat([IDS[:, 20:26], IDS[:, 30:36]])
    with torch.no_grad():
        expected = [model(torch.cat([IDS[:, :20], row[None]], dim=1)).logits[:, 20:] for row in rows]
    with attached_stream(tmp_path, model, settings(rule)) as attached:
        model(IDS[:, :20])
        cache = attached.cache()
        had = model(rows, past_key_values=cache).logits
        assert attached.session.num_tokens == 20
        assert cache.get_seq_length() == 26
    assert torch.allclose(had, torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize("name", ["maxsim", "rekv", "infllm"])
def test_a_batch_of_different_questions_is_refused_where_they_would_choose(name: str, tmp_path: Path) -> None:
    model = make_model()
    rows = torch.cat([IDS[:, 20:26], IDS[:, 30:36]])
    with attached_stream(tmp_path, model, settings(policy(name, recent_tokens=0), budget=16)) as attached:
        assert model(rows, past_key_values=attached.question()).logits.isfinite().all(), "nothing to choose from yet"
        model(token_ids(64))
        cache = attached.cache()
        for wrong in (cache, attached.question()):
            with pytest.raises(ShapeError, match="one at a time"):
                model(rows, past_key_values=wrong)
            embeddings = model.get_input_embeddings()(rows)
            with pytest.raises(ShapeError, match="one at a time"):
                model(inputs_embeds=embeddings, past_key_values=wrong)
        assert model(token_ids(3), past_key_values=cache).logits.isfinite().all()
        assert attached.session.num_tokens == 67, "the refused cache still appends"
        chosen = attached.question(rows[:1])
        assert model(rows, past_key_values=chosen).logits.isfinite().all()
        embeddings = (
            model.get_input_embeddings()(rows[:1].expand(3, -1)) * torch.tensor([1.0, 1.001, 0.999])[:, None, None]
        )
        assert model(inputs_embeds=embeddings, past_key_values=attached.question()).logits.isfinite().all()


def test_questions_that_choose_nothing_need_no_pass_and_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    forwards: list[int] = []
    with attached_stream(tmp_path, model, settings(policy("streaming_llm"), window=16)) as attached:
        model(IDS[:, :40])
        attached.session.commit()
        monkeypatch.setattr("kvstore.engines.transformers.content_ids", lambda *_: 1 / 0)
        counter = model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
        cache = attached.question(IDS[:, 40:43])
        model(IDS[:, 40:50], past_key_values=cache)
        assert len(forwards) == 1
        assert attached.last.num_attended_tokens == 40
        counter.remove()


def test_sessions_made_in_inference_mode_serve_outside_it(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        expected = model(IDS[:, :50]).logits
    answers = []
    for access, begin in ((Access.WRITE, 0), (Access.WRITE, 40), (Access.READ, 40)):
        with ExitStack() as stack:
            with torch.inference_mode():
                session = stack.enter_context(open_session(tmp_path, model, settings(ORIGINAL), access))
            with attach(model, session) as attached:
                if begin == 0:
                    feed(model, IDS[:, :40], (20, 20))
                cache = attached.question(IDS[:, 40:42])
                answers.append(model(IDS[:, 40:50], past_key_values=cache).logits)
    assert all(torch.allclose(had, expected[:, 40:], atol=1e-5) for had in answers)


def test_gradients_and_inference_mode_may_alternate(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        expected = model(IDS).logits
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached, torch.enable_grad():
        with torch.inference_mode():
            first = model(IDS[:, :11]).logits
        second = model(IDS[:, 11:19]).logits
        with torch.inference_mode():
            cache = attached.question(IDS[:, 19:22])
            model(IDS[:, 19:30], past_key_values=cache)
        third = model(IDS[:, 30:], past_key_values=cache).logits
    assert torch.allclose(torch.cat([first, second], dim=1), expected[:, :19], atol=1e-5)
    assert torch.allclose(third, expected[:, 30:], atol=1e-5)


def test_half_precision_is_exact_too(tmp_path: Path) -> None:
    model = make_model(dtype=torch.float16)
    own = DynamicCache()
    with torch.no_grad():
        expected = feed(model, IDS[:, :40], (17, 23), past_key_values=own)
    with attached_stream(tmp_path, model, settings(ORIGINAL)):
        had = feed(model, IDS[:, :40], (17, 23))
    assert all(torch.equal(a, b) for a, b in zip(had, expected, strict=True))


def test_wrong_questions_and_positions_are_refused(tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        model(IDS[:, :9])
        with pytest.raises(ShapeError, match="at least one token"):
            attached.question(IDS[:, :0])
        with pytest.raises(ShapeError, match="at least one token"):
            attached.question(torch.cat([IDS, IDS]))
        with pytest.raises(ShapeError, match="goes on at position 9"):
            model(IDS[:, 9:12], position_ids=torch.arange(3)[None])
        with pytest.raises(ShapeError, match="unpadded"):
            model(IDS[:, 9:12], attention_mask=torch.tensor([[1] * 9 + [0, 1, 1]]))
        with pytest.raises(ShapeError, match=r"crop\(3\)"):
            attached.cache().crop(3)
        with pytest.raises(ConfigError, match="cannot be reset"):
            attached.cache().reset()
        assert attached.session.num_tokens == 9


def test_another_models_stream_is_refused(tmp_path: Path) -> None:
    with attached_stream(tmp_path, make_model(), settings(ORIGINAL)):
        pass
    with (
        pytest.raises(SpecMismatchError),
        attached_stream(tmp_path, make_model("qwen2"), settings(ORIGINAL), Access.READ),
    ):
        pass
