# SPDX-License-Identifier: Apache-2.0
"""Streams that are thinned before they are stored: what stays, where it stands, what is asked, how it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.engines.transformers import Attached
from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.retention.received import MostReceived, SinkBuckets
from kvstore.retrieval.retention.thinning import Thinning
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.store import Access, Store
from tests.session_oracle import Choices, oracle, record, stored
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, open_session, policy, settings, token_ids

NUM_FRAMES = 12
RUN = 4 * BLOCK_TOKENS
BUCKETS = Thinning(SinkBuckets(), share=0.25, run_tokens=RUN)
IDS = token_ids(8 + NUM_FRAMES * 9, seed=4)
PROMPT = token_ids(7, seed=5)


def thinned(name: str = "livevlm", how: Thinning | None = BUCKETS, **changes: Any) -> SessionConfig:
    """A config of a policy that thins; some blocks are its window."""
    changes = {"recent_tokens": 8, **changes}
    return settings(policy(name, retention=how, **changes), window=24, sinks=4, budget=24)


def read(attached: Attached, first: int = 0, last: int = NUM_FRAMES) -> list[Tensor]:
    """A block of text, then frames of 8 tokens, each with a word behind it; a commit behind each. The logits."""
    model, session = attached.model, attached.session
    logits = []
    if not session.view.entries:
        session.segment(8, 0.0, 0.0, -1)
        logits.append(model(IDS[:, :8]).logits)
    for frame in range(first, last):
        start = 8 + 9 * frame
        session.segment(8, frame, frame + 1.0, frame)
        session.segment(1, frame, frame + 1.0, -1)
        logits.append(model(IDS[:, start : start + 9]).logits)
        session.commit({"next": frame + 1})
    if last == NUM_FRAMES:
        session.commit({"next": last}, partial=True)
        session.flush()
    return logits


@contextmanager
def stream(path: Path, config: SessionConfig, access: Access = Access.WRITE) -> Iterator[Attached]:
    """The tiny model on a stream."""
    with attached_stream(path, make_model(), config, access) as attached:
        yield attached


def test_what_is_stored_falls_to_the_share_and_text_stays(tmp_path: Path) -> None:
    nbytes = []
    for name, how in (("dense", None), ("thin", BUCKETS)):
        with stream(tmp_path / name, thinned(how=how)) as attached:
            read(attached)
            view = attached.session.view
            nbytes.append(view.store.stats().usage.extent_used_nbytes)
            sizes = {-1: 0, 0: 0}
            for entry in view.entries:
                sizes[min(entry.group, 0)] += entry.num_tokens
    assert sizes[-1] == 8 + NUM_FRAMES
    assert len(view.entries) == 1 + 2 * NUM_FRAMES, "every block keeps a token"
    assert NUM_FRAMES * 8 / 4 <= sizes[0] <= NUM_FRAMES * 8 / 4 + NUM_FRAMES, "one more for a block that had none"
    assert nbytes[1] < 0.7 * nbytes[0], "a record takes a page at least"
    positions = torch.cat([view.positions_of(entry) for entry in view.entries], dim=1)[0]
    assert bool((positions.diff() > 0).all())
    assert view.end_position == view.sequence_length == IDS.shape[1]
    assert view.num_tokens == sizes[-1] + sizes[0] == positions.shape[0]


def test_blocks_wait_for_their_run_and_questions_see_them_whole(tmp_path: Path) -> None:
    with stream(tmp_path, thinned()) as attached:
        view = attached.session.view
        read(attached, 0, 2)
        assert len(view.entries) == 1, "only text that nothing stands before"
        assert view.cursor == {}
        assert (view.num_tokens, view.sequence_length) == (26, 26)
        attached.model(PROMPT, past_key_values=attached.question())
        assert attached.last.num_attended_tokens == 26
        read(attached, 2, 4)
        assert len(view.entries) == 1 + 8
        assert view.cursor == {"next": 4}
        assert 8 + 4 + 8 <= view.num_tokens < 8 + 4 + 13
        assert view.sequence_length == view.end_position == 44


@pytest.mark.parametrize(("name", "killed"), [("livevlm", 1), ("livevlm", 5), ("infllm", 11)])
def test_a_resumed_stream_equals_an_uninterrupted_one(name: str, killed: int, tmp_path: Path) -> None:
    config = thinned(name)
    with stream(tmp_path / "whole", config) as attached:
        wanted = read(attached)
        entries = list(attached.session.view.entries)
        planes = [stored(attached, layer) for layer in range(3)]
        assert sum(entry.num_tokens for entry in entries) < 0.6 * IDS.shape[1]
    with stream(tmp_path / "killed", config) as attached:
        read(attached, 0, killed)  # what waits is lost
    with stream(tmp_path / "killed", config) as attached:
        begun = attached.session.view.cursor.get("next", 0)
        assert isinstance(begun, int)
        assert begun <= killed
        had = read(attached, begun)
        assert attached.session.view.entries == entries
        for layer in range(3):
            for plane, other in zip(planes[layer], stored(attached, layer), strict=True):
                assert torch.equal(plane, other)
    for part, other in zip(reversed(had), reversed(wanted), strict=False):
        assert torch.equal(part, other)


@pytest.mark.parametrize("is_dropped", [True, False])
def test_a_forward_that_is_taken_back_has_no_say_in_what_stays(is_dropped: bool, tmp_path: Path) -> None:
    found = []
    for path in (tmp_path / "plain", tmp_path / "taken back"):
        with stream(path, thinned("streaming_llm", Thinning(MostReceived(), 0.5, 40))) as attached:
            model: Any = attached.model
            model(IDS[:, :20])
            if path.name == "taken back" and is_dropped:
                model(token_ids(30, seed=6))
                attached.session.drop(30)
            elif path.name == "taken back":
                handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(token_ids(30, seed=6))
                handle.remove()
            model(IDS[:, 20:40])
            attached.session.commit(partial=True)
            found.append([entry.key for entry in attached.session.view.entries])
    assert found[0] == found[1]


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Choices:
    """Record what `Branch` attends to."""
    return record(monkeypatch)


@pytest.mark.parametrize(
    ("name", "changes", "access"),
    [
        ("livevlm", {}, Access.WRITE),
        ("quest", {"full_layers": 0}, Access.READ),
        ("quest", {"full_layers": 3}, Access.WRITE),
        ("rekv", {"position": PositionPolicy.SHRINK}, Access.READ),
        ("maxsim", {"position": PositionPolicy.ORIGINAL}, Access.READ),
    ],
)
def test_answers_equal_dense_attention_over_what_was_kept(
    name: str, changes: dict[str, Any], access: Access, choices: Choices, tmp_path: Path
) -> None:
    config = thinned(name, **changes)
    with stream(tmp_path, config) as attached:
        read(attached)
        if access is Access.WRITE:
            check(attached, choices)
    if access is Access.READ:
        with stream(tmp_path, config, access) as attached:
            check(attached, choices)


def check(attached: Attached, choices: Choices) -> None:
    """Ask and compare; nothing follows the numbers of the tokens."""
    had = attached.model(PROMPT, past_key_values=attached.question()).logits
    assert torch.allclose(had, oracle(attached, choices, PROMPT, num_near=9), atol=1e-4, rtol=1e-4)
    attached.session.view.has_positions = False  # as if all had been kept
    wrong = oracle(attached, choices, PROMPT, num_near=9)
    attached.session.view.has_positions = True
    if attached.session.view.policy.position is PositionPolicy.ORIGINAL:
        assert (had - wrong).abs().max() > 0.01, "the positions matter"


def test_runs_that_are_cut_elsewhere_have_names_of_their_own(tmp_path: Path) -> None:
    found: list[dict[Any, int]] = []
    for number, cut in enumerate((3, 2)):
        with stream(tmp_path / str(number), thinned()) as attached:
            read(attached, 0, cut)
            attached.session.commit(partial=True)
            found.append({entry.key: entry.num_tokens for entry in attached.session.view.entries})
    shared = found[0].keys() & found[1].keys()
    assert shared, "the text before is the same"
    assert all(found[0][key] == found[1][key] for key in shared)
    assert len(shared) < len(found[1])


def test_text_alone_is_never_thinned_nor_kept_waiting(tmp_path: Path) -> None:
    with stream(tmp_path, thinned()) as attached:
        attached.model(IDS[:, :40])
        attached.session.commit({"next": 1})
        assert attached.session.view.cursor == {"next": 1}
        assert [entry.num_tokens for entry in attached.session.view.entries] == [8] * 5
    with stream(tmp_path / "all", thinned("streaming_llm", Thinning(MostReceived(), 0.5, 40))) as attached:
        attached.model(IDS[:, :40])
        attached.session.commit()
        assert sum(entry.num_tokens for entry in attached.session.view.entries) in range(20, 26)
        attached.model(IDS[:, 40:50])
        assert attached.session.view.sequence_length == 50


def test_other_thinnings_and_rotated_keys_are_refused(tmp_path: Path) -> None:
    with stream(tmp_path, thinned()) as attached:
        read(attached)
    others = (replace(BUCKETS, share=0.5), replace(BUCKETS, run_tokens=64), Thinning(MostReceived(), 0.25, RUN))
    for how in (None, *others):
        with pytest.raises(ConfigError, match="made otherwise"), stream(tmp_path, thinned(how=how)):
            pass
    rule = policy("streaming_llm", retention=BUCKETS)
    with open_session(tmp_path / "rotated", make_model(), settings(rule)) as session:
        view = session.view
        with pytest.raises(ConfigError, match="stored rotated"):
            Session(view.store, view.header, view.config, None, torch.device("cpu"))


def test_senseless_thinnings_are_refused() -> None:
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"run_tokens": 0}):
        with pytest.raises(ConfigError):
            Thinning(SinkBuckets(), **wrong)
    with pytest.raises(ConfigError, match="must not depend"):
        Policy("x", "", late=policy("maxsim").late, beyond=policy("livevlm"))


def test_a_block_without_positions_is_lost_to_questions_and_ends_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = thinned(recent_tokens=32)
    with stream(tmp_path, config) as attached:
        read(attached)
        entry = attached.session.view.entries[-2]
    summaries = Store.summaries
    monkeypatch.setattr(
        Store,
        "summaries",
        lambda self, name, first, count: {
            index: b"" if index == entry.index else data for index, data in summaries(self, name, first, count).items()
        },
    )
    with stream(tmp_path, config, Access.READ) as attached:
        assert attached.model(PROMPT, past_key_values=attached.question()).logits.isfinite().all()
        assert list(attached.last.load.lost) == [entry.key]
    with stream(tmp_path, config) as attached, pytest.raises(CorruptRecordError, match="shorter than its header"):
        attached.model(PROMPT)
