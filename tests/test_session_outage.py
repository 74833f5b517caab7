# SPDX-License-Identifier: Apache-2.0
"""Questions that get none of their blocks, and forwards of theirs that fail and are tried again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.errors import CapacityError
from kvstore.retrieval.triggers.ahead import Ahead
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.session.attending import Attending
from kvstore.session.branch import Branch
from kvstore.session.choosing import LayerChoices
from kvstore.session.context import LayerContext
from kvstore.session.reading.past import Reading
from kvstore.store import Access, FetchReport, FetchRequest, Outcome, Store
from tests.tiny_models import attached_stream, make_model, policy, settings, token_ids

STREAM = token_ids(96)
PROMPT = token_ids(7, seed=3)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store that holds 12 blocks."""
    model = make_model()
    with attached_stream(tmp_path, model, settings(policy("maxsim"), window=16, sinks=4)) as attached:
        for part in STREAM.split(32, dim=1):
            model(part)
        attached.session.commit()
    return tmp_path


@pytest.mark.parametrize("name", ["maxsim", "rekv", "quest", "infllm", "retroinfer", "ape"])
def test_a_question_whose_blocks_are_all_lost_is_answered_from_nothing(
    name: str, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    fetch = Store.fetch

    def losing(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        report = fetch(self, requests, timeout_s)
        if timeout_s is not None:  # a question's, not the search's
            report.outcomes[:] = [Outcome.MISS] * len(requests)
        return report

    monkeypatch.setattr(Store, "fetch", losing)
    config = replace(settings(policy(name, full_layers=0), window=16, sinks=4, budget=24), load_timeout_s=60.0)
    with attached_stream(filled, model, config, Access.READ) as attached:
        cache = attached.question()
        had = [model(ids, past_key_values=cache).logits for ids in (PROMPT, PROMPT[:, :1])]
        assert all(logits.isfinite().all() for logits in had)
        assert attached.last.num_attended_tokens == 0
        assert attached.last.load.lost
        assert not attached.session.view.residency._places


def test_a_forward_whose_read_failed_can_be_tried_again(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = make_model(), settings(policy("quest", full_layers=0), window=16, sinks=4, budget=24)
    attend_to, had = Branch.attend_to, []
    for failing_layer in (None, 0, 1, 2):

        def failing(
            self: Branch, attending: Attending, reading: Reading, layers: range, *args: Any, at: Any = failing_layer
        ) -> frozenset[int]:
            if layers.start == at:
                raise CapacityError("no room")
            return attend_to(self, attending, reading, layers, *args)

        with attached_stream(filled, model, config, Access.READ) as attached:
            cache = attached.question()
            model(PROMPT, past_key_values=cache)
            with monkeypatch.context() as patch:
                patch.setattr(Branch, "attend_to", failing)
                patch.setattr(Branch, "attend_to_differences", lambda *_: {})
                if failing_layer is not None:
                    with pytest.raises(CapacityError):
                        model(STREAM[:, :1], past_key_values=cache)
            had.append(model(STREAM[:, :1], past_key_values=cache).logits)
    for each in had:
        torch.testing.assert_close(each, had[0], atol=1e-5, rtol=1e-5)  # rows may stand in another order


@pytest.mark.parametrize("name", ["quest", "retroinfer", "infllm"])
@pytest.mark.parametrize("poison", [1e35, float("inf"), float("nan")])
def test_a_block_that_cannot_be_compared_is_named_and_stops_no_question(
    name: str, poison: float, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fetch = make_model(), Store.fetch
    config = settings(policy(name, full_layers=0, recent_tokens=0), window=16, sinks=4, budget=1000)
    with attached_stream(filled, model, config, Access.READ) as attached:
        key = attached.session.view.entries[5].key

    def poisoned(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        report = fetch(self, requests, timeout_s)
        for request in requests:
            if request.key == key and request.layers is None:
                request.slot.view(torch.float32)[::7] = poison
        return report

    monkeypatch.setattr(Store, "fetch", poisoned)
    with attached_stream(filled, model, config, Access.READ) as attached:
        logits = model(PROMPT, past_key_values=attached.question()).logits
        assert logits.isfinite().all()
        assert list(attached.session.view.damaged) == [5]
        assert attached.last.num_attended_tokens == 96 - 8


def test_rows_whose_replacing_failed_are_read_anew(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = make_model(), settings(policy("quest", full_layers=0), window=16, sinks=4, budget=24)
    had = []
    for fails in (False, True):
        with attached_stream(filled, model, config, Access.READ) as attached:
            cache = attached.question()
            model(PROMPT, past_key_values=cache)
            if fails:
                with monkeypatch.context() as patch:
                    patch.setattr(LayerContext, "replace", lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        model(STREAM[:, :1], past_key_values=cache)
            had.append(model(STREAM[:, :1], past_key_values=cache).logits)
    assert torch.allclose(had[0], had[1], atol=1e-5)


def test_a_layer_that_reads_everything_forgets_what_waited_for_it(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    rule = policy("quest", full_layers=1, recent_tokens=0, trigger=Ahead(EveryStep()))
    with attached_stream(filled, model, settings(rule, window=16, sinks=4, budget=24), Access.READ) as attached:
        monkeypatch.setattr(LayerChoices, "_fits", lambda self: False)
        cache: Any = attached.question(PROMPT)
        for seed in range(3):
            model(token_ids(1, seed=seed), past_key_values=cache)
        monkeypatch.setattr(LayerChoices, "_fits", lambda self: True)
        cache.reset()
        with cache.branch.recalling():
            model(PROMPT, past_key_values=cache)
        for seed in range(3):
            model(token_ids(1, seed=seed), past_key_values=cache)
            assert cache.branch.contexts[0].num_past == 96
