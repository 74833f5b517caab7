# SPDX-License-Identifier: Apache-2.0
"""Streams that retrieve while they grow: what is stored depends on the stream alone, not on who asked meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.store import FetchReport, FetchRequest, Outcome, Store
from tests.session_oracle import stored
from tests.tiny_models import attached_stream, make_model, policy, settings, token_ids

PARTS = token_ids(160).split(20, dim=1)
CONFIG = settings(policy("infllm", segmenter=Pages(12)), window=24, sinks=4, budget=32)


def stored_after(path: Path, questions_after: tuple[int, ...] = (), sessions: tuple[int, ...] = (8,)) -> list[Tensor]:
    """Keys of every layer, after some appends in each session and a question after some of them."""
    model, done = make_model(), 0
    for count in sessions:
        with attached_stream(path, model, CONFIG) as attached:
            for part in PARTS[done : done + count]:
                model(part)
                if done in questions_after:
                    model(token_ids(5, seed=3), past_key_values=attached.question())
                done += 1
            attached.session.commit(partial=done == len(PARTS))
            attached.session.flush()
            if done == len(PARTS):
                return [stored(attached, layer)[0] for layer in range(3)]
    raise AssertionError("not all was appended")


@pytest.mark.parametrize("after", [(3,), (2, 3, 6)])
def test_a_question_leaves_nothing_in_what_is_appended_later(after: tuple[int, ...], tmp_path: Path) -> None:
    for asked, alone in zip(stored_after(tmp_path / "a", after), stored_after(tmp_path / "b"), strict=True):
        assert torch.equal(asked, alone)


def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    resumed = stored_after(tmp_path / "a", (1,), sessions=(2, 2, 4))  # whole blocks are stored after each
    for had, alone in zip(resumed, stored_after(tmp_path / "b"), strict=True):
        assert torch.equal(had, alone)


def test_a_retrieved_block_that_is_lost_stops_an_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored must not depend on the disk; a session that opens then does not find the block, and goes on."""
    model, fetch, lost = make_model(), Store.fetch, []

    def losing(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        report = fetch(self, requests, timeout_s)
        for number, request in enumerate(requests):
            if request.key in lost:
                report.outcomes[number], report.reasons[number] = Outcome.DAMAGED, "it fails its checksum"
        return report

    with attached_stream(tmp_path, model, CONFIG) as attached:
        for part in PARTS[:6]:
            model(part)
        session = attached.session
        window = session._window
        pinned = {entry.key for entry in (*window._sinks(), *window.blocks)}
        for key, place in list(session.view.residency._places.items()):
            if key not in pinned and not place.pins:
                session.view.residency._pool.free(session.view.residency._places.pop(key).slot_idx)
        lost += [entry.key for entry in session.view.entries if entry.key not in pinned]
        monkeypatch.setattr(Store, "fetch", losing)
        with pytest.raises(CorruptRecordError, match="fails its checksum"):
            model(PARTS[6])
    with attached_stream(tmp_path, model, CONFIG) as attached:
        done = attached.session.num_tokens
        assert torch.cat(PARTS, dim=1)[:, done:].shape[1] > 20
        model(torch.cat(PARTS, dim=1)[:, done:])


def test_what_was_computed_under_another_budget_has_another_name(tmp_path: Path) -> None:
    other = replace(CONFIG, budget_tokens=8)
    assert other.prefill != CONFIG.prefill
    blind = settings(policy("quest"), window=24, sinks=4, budget=32)
    assert blind.prefill == replace(blind, budget_tokens=8).prefill, "questions name nothing"
    with attached_stream(tmp_path, make_model(), CONFIG) as attached:
        attached.model(PARTS[0])
    with pytest.raises(ConfigError, match="made otherwise"), attached_stream(tmp_path, make_model(), other):
        pass
