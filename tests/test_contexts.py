# SPDX-License-Identifier: Apache-2.0
"""Streams that were read apart and are asked about together, against dense attention that is written out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore
from kvstore.errors import ConfigError, ReadOnlyError, ShapeError, SpecMismatchError, StreamNotFoundError
from kvstore.retrieval.fusion import ExtraScores
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.registry import policies
from kvstore.tiers.disk import Found
from tests.dense_contexts import DOCUMENTS, NAMES, PREFIX, QUESTION, dense, opened
from tests.tiny_models import BLOCK_TOKENS, make_model, policy


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """A store with a prefix and a fork of it for every document; nobody changes it."""
    path = tmp_path_factory.mktemp("contexts")
    with opened(path, model) as store:
        prefix = store.stream("prefix")
        with kvstore.attach(model, prefix):
            model(PREFIX)
        for name, document in zip(NAMES, DOCUMENTS, strict=True):
            with kvstore.attach(model, prefix.fork(name)):
                model(document)
    return path


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def named(monkeypatch: pytest.MonkeyPatch, rule: Policy) -> None:
    """Let every name stand for one policy."""
    monkeypatch.setattr("kvstore.face.policy_named", lambda name: rule)


@pytest.mark.parametrize(("temperature", "scale"), [(0.9, 0.9), (0.5, 0.8), (1.0, 1.0)])
def test_an_answer_from_contexts_side_by_side_is_dense_attention_to_them(
    temperature: float, scale: float, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, replace(policy("ape"), context_temperature=temperature, context_scale=scale))
    wanted = dense(model, [(tokens, 16) for tokens in DOCUMENTS], PREFIX, temperature=temperature, scale=scale)
    with opened(folder, model, kvstore.Access.READ) as store:
        contexts = store.contexts(NAMES, device_nbytes=0)  # fewer slots than blocks: read in turns
        with kvstore.attach(model, contexts) as attached:
            cache = attached.question()
            torch.testing.assert_close(model(QUESTION, past_key_values=cache).logits, wanted, atol=1e-4, rtol=1e-4)
            apart = attached.question()
            for token in QUESTION.unbind(1):
                last = model(token[:, None], past_key_values=apart).logits
            torch.testing.assert_close(last, wanted[:, -1:], atol=1e-4, rtol=1e-4)
        assert contexts.last.num_attended_tokens == 16 + 29 + 45 + 8
        # Another temperature would have been noticed.
        other = dense(model, [(tokens, 16) for tokens in DOCUMENTS], PREFIX, temperature=0.8, scale=scale)
        assert (other - wanted).abs().max() > 1e-2


def test_contexts_one_behind_the_other_are_moved_there(folder: Path, model: Any) -> None:
    wanted = dense(model, [(DOCUMENTS[1], 16), (DOCUMENTS[0], 16 + 45)], PREFIX)
    with opened(folder, model, kvstore.Access.READ) as store:
        contexts = store.contexts(["b", "a"], policy="rekv", placed="consecutive")
        with kvstore.attach(model, contexts) as attached:
            had = model(QUESTION, past_key_values=attached.question()).logits
        torch.testing.assert_close(had, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [None, 100_000])
def test_one_context_is_its_stream(budget: int | None, folder: Path, model: Any) -> None:
    with opened(folder, model) as store:
        answers = []
        for stream in (store.stream("a", policy="auto"), store.contexts(["a"], policy="auto", budget_tokens=budget)):
            with kvstore.attach(model, stream) as attached:
                answers.append(model(QUESTION, past_key_values=attached.question()).logits)
            answers.append(dense(model, [(DOCUMENTS[0], 16)], PREFIX))
        for answer in answers[1:]:
            torch.testing.assert_close(answer, answers[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(name for name, each in policies().items() if each.retrieves))
def test_policies_choose_within_contexts(name: str, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for all, all is read; with less, the budget holds."""
    rule = policy(name, estimated_share=0.0)
    named(monkeypatch, rule)
    parts = [(tokens, 16) for tokens in DOCUMENTS[:2]]
    wanted = dense(model, parts, PREFIX, temperature=rule.context_temperature, scale=rule.context_scale)
    with opened(folder, model, kvstore.Access.READ) as store:
        contexts = store.contexts(["a", "b"], policy=name, budget_tokens=1000)
        with kvstore.attach(model, contexts) as attached:
            had = model(QUESTION, past_key_values=attached.question()).logits
        if name != "livevlm":  # it takes a share of what there is
            torch.testing.assert_close(had, wanted, atol=1e-4, rtol=1e-4)
        named(monkeypatch, replace(rule, full_layers=0))
        few = store.contexts(["a", "b"], policy=name, budget_tokens=2 * BLOCK_TOKENS)
        with kvstore.attach(model, few) as attached:
            model(QUESTION, past_key_values=attached.question())
        most = 3 if rule.shares_layers else 1  # times what each layer would read
        assert 16 < few.last.num_attended_tokens <= 16 + most * 2 * BLOCK_TOKENS


def test_chosen_blocks_are_attended_where_their_contexts_stand(folder: Path, model: Any) -> None:
    """`maxsim` finds the document that has the question's words; nothing else is attended but the prefix."""
    asked = DOCUMENTS[1][:, 16:24]
    with opened(folder, model, kvstore.Access.READ) as store:
        contexts = store.contexts(["a", "b"], policy="maxsim", budget_tokens=BLOCK_TOKENS)
        with kvstore.attach(model, contexts) as attached:
            had = model(QUESTION, past_key_values=attached.question(asked)).logits
    begin = 16 + 29 + 16
    seen = [*range(16), *range(begin, begin + 8)]
    wanted = dense(model, [(tokens, 16) for tokens in DOCUMENTS[:2]], PREFIX, seen=seen)
    torch.testing.assert_close(had, wanted, atol=1e-4, rtol=1e-4)


def test_what_contexts_begin_with_is_stored_and_read_once(folder: Path, model: Any) -> None:
    with opened(folder, model, kvstore.Access.READ) as store:
        streams = {name: store.blocks.manifest(name).entries for name in ("prefix", *NAMES)}
        shared = [entry.key for entry in streams["prefix"]]
        assert [entry.key for entry in streams["b"][:2]] == shared
        assert store.blocks.stats().num_blocks == 2 + 4 + 6 + 1
        contexts = store.contexts(NAMES)
        with kvstore.attach(model, contexts) as attached:
            attached.question()
            model(QUESTION, past_key_values=attached.question())
            assert len(attached.session.view.entries) == 13
        assert store.blocks.stats().host.misses == 13, "and once they came from disk"


def test_contexts_need_nothing_in_common(tmp_path: Path, model: Any) -> None:
    with opened(tmp_path, model) as store:
        for name, document in zip(NAMES, DOCUMENTS, strict=True):
            with kvstore.attach(model, store.stream(name)):
                model(document)
        contexts = store.contexts(NAMES, policy="rekv")
        with kvstore.attach(model, contexts) as attached:
            had = model(QUESTION, past_key_values=attached.question()).logits
    nothing = PREFIX[:, :0]
    wanted = dense(model, [(tokens, 0) for tokens in DOCUMENTS], nothing)
    torch.testing.assert_close(had, wanted, atol=1e-4, rtol=1e-4)


def test_a_lost_block_is_a_miss_and_its_context_is_named(own_folder: Path, model: Any) -> None:
    with opened(own_folder, model) as store:
        (found,) = store.blocks._disk.look_up([store.blocks.manifest("b").entries[3].key], [False])
        assert isinstance(found, Found)
        extent = found.record.extent
        path = store.blocks._disk.files.path(extent.file_id)
    with path.open("r+b") as file:
        file.seek(extent.offset + 1000)
        file.write(bytes(100))
    begin = 16 + 29 + 8
    seen = [token for token in range(16 + 29 + 45) if not begin <= token < begin + 8]
    wanted = dense(model, [(tokens, 16) for tokens in DOCUMENTS[:2]], PREFIX, temperature=0.9, scale=0.9, seen=seen)
    with opened(own_folder, model, kvstore.Access.READ) as store:
        contexts = store.contexts(["a", "b"])
        with kvstore.attach(model, contexts) as attached:
            had = model(QUESTION, past_key_values=attached.question()).logits
        assert list(contexts.lost) == ["b"]
        assert contexts.lost["b"][0].startswith("block 3: ")
    torch.testing.assert_close(had, wanted, atol=1e-4, rtol=1e-4)


def test_contexts_take_nothing_in(folder: Path, model: Any) -> None:
    with opened(folder, model) as store:
        contexts = store.contexts(["a", "b"])
        with kvstore.attach(model, contexts) as attached:
            with pytest.raises(ReadOnlyError, match="a, b are read together"):
                model(QUESTION)
            with pytest.raises(ReadOnlyError, match="a, b are read together"):
                model(QUESTION.expand(2, -1))
            cache = attached.question()
            model(QUESTION.expand(2, -1), past_key_values=cache)
            assert model.generate(QUESTION, max_new_tokens=3, do_sample=False).shape == (1, 10)
        with pytest.raises(ReadOnlyError, match="no stream of their own; fork one"):
            contexts.fork("d")
        with pytest.raises(ReadOnlyError, match="no stream of their own; roll back one"):
            contexts.rollback(0)
        contexts.commit()
        assert [header.name for header in store.blocks.streams()] == ["a", "b", "c", "prefix"]


def test_contexts_that_do_not_fit_together_are_refused(
    own_folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(own_folder, model) as store:
        with kvstore.attach(model, store.stream("narrow", window_tokens=64)):
            model(DOCUMENTS[0])
        with pytest.raises(ConfigError, match="'a' and 'narrow' were written with other settings"):
            store.contexts(["a", "narrow"])
        for names in ([], ["a", "b", "a"]):
            with pytest.raises(ConfigError, match="at least one stream, and each once"):
                store.contexts(names)
        with pytest.raises(StreamNotFoundError, match="no stream 'z'"):
            store.contexts(["a", "z"])
        with pytest.raises(ConfigError, match="placed 'shrink'"):
            store.contexts(["a", "b"], placed="shrink")
        with pytest.raises(ConfigError, match="chooses nothing of contexts"):
            store.contexts(["a", "b"], policy="streaming_llm", budget_tokens=64)
        late = store.contexts(["a", "b"])
        store.blocks.remove_stream("b")
        store.stream("b")
        with pytest.raises(StreamNotFoundError, match="'b' was replaced"), kvstore.attach(model, late):
            pass
    other = make_model(num_hidden_layers=2)
    with opened(own_folder, other, kvstore.Access.READ) as store, pytest.raises(SpecMismatchError, match="num_layers"):
        store.contexts(["a", "c"])


def test_external_scores_are_of_all_blocks_of_all_contexts(folder: Path, model: Any) -> None:
    with opened(folder, model, kvstore.Access.READ) as store:
        contexts = store.contexts(["a", "b"], policy="quest", budget_tokens=16)
        with kvstore.attach(model, contexts) as attached:
            with pytest.raises(ShapeError, match="has 12 blocks"):
                attached.question(external=[ExtraScores(torch.zeros(11))])
            model(QUESTION, past_key_values=attached.question(external=[ExtraScores(torch.arange(12.0), 100.0)]))
        assert {span.first_token for span in contexts.last.spans} == {16 + 29 + 32}, "the page that ends with the best"
