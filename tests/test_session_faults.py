# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a question: blocks damaged or gone, summaries damaged, a pool that is full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.engines.anatomy import rotation_of, spec_of
from kvstore.engines.transformers import attach
from kvstore.errors import CapacityError, CorruptRecordError, StoreIOError
from kvstore.layout import BlockLayout
from kvstore.session.branch import Branch
from kvstore.session.session import Session
from kvstore.store import Access, FetchReport, FetchRequest, Manifest, Outcome, Profile, Store, StreamHeader
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.writing import committer
from tests.tiny_models import BLOCK_TOKENS, ORIGINAL, attached_stream, make_model, policy, settings, token_ids

STREAM = token_ids(96)
PROMPT = token_ids(7, seed=3)
CONFIG = settings(policy("maxsim"), window=16, sinks=4, budget=24)


def refuse(*_: object) -> None:
    """Stands for anything that writes."""
    raise CapacityError("the file system is full")


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store that holds 12 blocks."""
    model = make_model()
    with attached_stream(tmp_path, model, CONFIG) as attached:
        for number in range(12):
            attached.session.segment(BLOCK_TOKENS, float(number), number + 1.0, number)
        for part in STREAM.split(32, dim=1):
            model(part)
        attached.session.commit()
    return tmp_path


@pytest.mark.parametrize("outcome", [Outcome.MISS, Outcome.DAMAGED])
@pytest.mark.parametrize("name", ["maxsim", "rekv"])
def test_a_lost_block_is_named_and_the_rest_answers(
    name: str, outcome: Outcome, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    config = settings(policy(name), window=16, sinks=4, budget=24)
    with attached_stream(filled, model, config, Access.READ) as attached:
        attached.question(PROMPT)
        whole = attached.last
        best = next(span for span in whole.spans if span.is_attended).first_token // BLOCK_TOKENS
        key = attached.session.view.entries[best].key
    fetch = Store.fetch

    def losing(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        report = fetch(self, requests, timeout_s)
        for number, request in enumerate(requests):
            # What is searched by single layers is read whole, and the other way round.
            is_search = (name == "maxsim") == (request.layers is not None)
            if request.key == key and not is_search:
                request.slot.fill_(255)
                report.outcomes[number] = outcome
                report.reasons[number] = "its third plane fails its checksum"
        return report

    monkeypatch.setattr(Store, "fetch", losing)
    with attached_stream(filled, model, config, Access.READ) as attached:
        cache = attached.question(PROMPT)
        lost = attached.last
        logits = model(PROMPT, past_key_values=cache).logits
        assert {place.pins for place in attached.session.view.residency._places.values()} == {0}
        assert key not in attached.session.view.residency._places
    assert lost.load.lost == {key: "its third plane fails its checksum"}
    assert logits.isfinite().all()
    if name == "maxsim":  # rekv's later layers ask with what the earlier ones made of the loss
        assert [(span.score, span.first_token) for span in lost.spans] == [
            (span.score, span.first_token) for span in whole.spans
        ]
        assert lost.num_attended_tokens == whole.num_attended_tokens - BLOCK_TOKENS
        assert [span.first_token for span in whole.spans if span.is_attended] == [
            span.first_token for span in lost.spans if span.is_attended or span.first_token == best * BLOCK_TOKENS
        ]


def test_an_answer_without_a_block_is_as_if_it_had_not_been_chosen(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with attached_stream(filled, model, CONFIG, Access.READ) as attached:
        attached.question(PROMPT)
        gone = [span.first_token // BLOCK_TOKENS for span in attached.last.spans if span.is_attended][1]
        key = attached.session.view.entries[gone].key
    fetch, choose = Store.fetch, Branch._choose

    def losing(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        report = fetch(self, requests, timeout_s)
        for number, request in enumerate(requests):
            if request.key == key and (request.layers is None or len(request.layers) > 1):  # not when it is searched
                report.outcomes[number] = Outcome.DAMAGED
        return report

    with monkeypatch.context() as patched:
        patched.setattr(Store, "fetch", losing)
        with attached_stream(filled, model, CONFIG, Access.READ) as attached:
            had = model(PROMPT, past_key_values=attached.question(PROMPT)).logits
    monkeypatch.setattr(Branch, "_choose", lambda self, ranking: [e for e in choose(self, ranking) if e.key != key])
    with attached_stream(filled, model, CONFIG, Access.READ) as attached:
        wanted = model(PROMPT, past_key_values=attached.question(PROMPT)).logits
        assert not attached.last.load.lost
    assert torch.equal(had, wanted)


@pytest.mark.parametrize("damage", [None, b"", b"KVS0", b"x" * 40])
def test_a_damaged_summary_hides_nothing(damage: bytes | None, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    summaries = Store.summaries

    def damaged(self: Store, name: str, first: int, count: int) -> dict[int, bytes]:
        found = summaries(self, name, first, count)
        return found | {5: damage} if damage is not None else {at: data for at, data in found.items() if at != 5}

    monkeypatch.setattr(Store, "summaries", damaged)
    config = settings(policy("rekv"), window=16, sinks=4, budget=1000)
    with attached_stream(filled, model, config, Access.READ) as attached:
        cache = attached.question(PROMPT)
        assert attached.last.num_attended_tokens == STREAM.shape[1]
        assert model(PROMPT, past_key_values=cache).logits.isfinite().all()


def test_a_block_whose_keys_cannot_be_read_is_named_and_the_others_are_found(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with attached_stream(filled, model, CONFIG, Access.READ) as attached:
        key = attached.session.view.entries[5].key
    fetch = Store.fetch

    def losing(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        report = fetch(self, requests, timeout_s)
        for number, request in enumerate(requests):
            if request.key == key:
                report.outcomes[number], report.reasons[number] = Outcome.DAMAGED, "its first plane is torn"
        return report

    monkeypatch.setattr(Store, "fetch", losing)
    with attached_stream(filled, model, CONFIG, Access.READ) as attached:
        cache = attached.question(STREAM[:, 64:72])
        assert attached.last.spans[0].first_token == 64
        assert attached.session.view.damaged == {5: "its first plane is torn"}
        assert model(PROMPT, past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("index", [0, 5, 11])
@pytest.mark.parametrize("num_tokens", [0, BLOCK_TOKENS - 1, BLOCK_TOKENS + 1, 2**32 - 1])
def test_a_stream_whose_entries_lie_about_their_sizes_is_refused(
    index: int, num_tokens: int, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, manifest = make_model(), Store.manifest

    def lying(self: Store, name: str, known: Manifest | None = None) -> Manifest:
        found = manifest(self, name, known)
        entries = [replace(e, num_tokens=num_tokens) if e.index == index else e for e in found.entries]
        return replace(found, entries=entries)

    monkeypatch.setattr(Store, "manifest", lying)
    for access in Access:
        match = r"entry \d+ says|tokens, 96 are announced"
        with pytest.raises(CorruptRecordError, match=match), attached_stream(filled, model, CONFIG, access):
            pass


def test_a_full_pool_is_reported_and_nothing_stays_pinned(filled: Path) -> None:
    model = make_model()
    config = settings(policy("maxsim"), window=16, sinks=4, budget=1000)
    with attached_stream(filled, model, config, Access.READ) as attached:
        pool, residency = attached.session.view.residency.pool, attached.session.view.residency
        wanted = model(PROMPT, past_key_values=attached.question(PROMPT)).logits
        taken = [slot for _ in range(pool.num_slots) if (slot := pool.allocate()) is not None]
        held = [entry.key for entry in attached.session.view.entries[:6]]
        for key in list(residency._places)[:9]:
            residency._drop(key)  # makes room for nothing: pins go below zero and are set right again
            residency._places[key].pins += 1
        for key in [key for key in residency._places if key not in held]:
            pool.free(residency._places.pop(key).slot_idx)
            taken.append(pool.allocate() or 0)
        assert torch.equal(model(PROMPT, past_key_values=attached.question(PROMPT)).logits, wanted), "in several turns"
        for key in list(residency._places):
            pool.free(residency._places.pop(key).slot_idx)
            taken.append(pool.allocate() or 0)
        with pytest.raises(CapacityError, match="raise device_nbytes"):
            attached.question(PROMPT)
        assert not residency._places
        for slot in taken[:8]:
            pool.free(slot)
        assert torch.equal(model(PROMPT, past_key_values=attached.question(PROMPT)).logits, wanted)
        assert {place.pins for place in residency._places.values()} == {0}


def test_a_window_larger_than_the_pool_is_reported_and_can_be_dropped(tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(ORIGINAL, window=100_000)) as attached:
        session, pool = attached.session, attached.session.view.residency.pool
        taken = [pool.allocate() for _ in range(pool.num_slots - 4)]
        model(token_ids(20))
        with pytest.raises(CapacityError, match="raise device_nbytes"):
            model(token_ids(30))
        assert session.num_tokens == 20
        for slot in taken[:8]:
            assert slot is not None
            pool.free(slot)
        assert model(token_ids(30)).logits.isfinite().all()
        assert session.num_tokens == 50


def test_after_a_failed_append_the_session_refuses_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, CONFIG) as attached:
        session = attached.session
        model(STREAM[:, :32])
        session.commit({"at": 32})
        session.flush()
        with monkeypatch.context() as full:
            full.setattr(DiskTier, "allocate", refuse)
            model(STREAM[:, 32:64])
            session.commit({"at": 64})
            with pytest.raises(CapacityError, match="file system is full"):
                session.flush()
        for goes_on in (
            lambda: model(STREAM[:, 64:]),
            lambda: session.commit({"at": 64}),
            lambda: session.segment(8, 0.0, 1.0, 0),
            attached.question,
        ):
            with pytest.raises(StoreIOError, match="open the stream again"):
                goes_on()
    with attached_stream(tmp_path, model, CONFIG) as attached:
        session = attached.session
        assert (session.view.cursor, session.num_tokens) == ({"at": 32}, 32)
        model(STREAM[:, 32:])
        session.commit({"at": 96})
        session.flush()
        assert len(session.view.store.manifest("s").entries) == 12
        assert session.view.store.verify().is_clean


@pytest.mark.parametrize("is_known_elsewhere", [False, True])
def test_a_cursor_does_not_move_past_blocks_whose_loss_another_was_told_of(
    is_known_elsewhere: bool, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = make_model(), CONFIG if is_known_elsewhere else settings(policy("maxsim"), window=32, sinks=4)
    spec = spec_of(model)
    layout, rotate = BlockLayout(spec, BLOCK_TOKENS), rotation_of(model)
    with Store.open(filled, access=Access.WRITE, layout=layout, host_nbytes=4 << 20) as store:
        store.create_stream(StreamHeader("twin", spec, BLOCK_TOKENS, Profile.LOSSLESS, config.prefill, {}, 0.0))
        session = Session(store, store.manifest("twin").header, config, rotate, torch.device("cpu"))
        with attach(model, session):
            with monkeypatch.context() as full:
                full.setattr(committer, "append_entries", refuse)
                model(STREAM[:, :32])
                session.commit({"at": 32})
                with pytest.raises(CapacityError, match="file system is full"):
                    store.flush()
            assert all(store.exists([entry.key for entry in session.view.entries])) == is_known_elsewhere
            for _ in range(2):
                with pytest.raises(StoreIOError, match="open the stream again"):
                    session.commit({"at": 33})
        assert store.manifest("twin").cursor == {}


def test_an_append_that_the_store_refuses_breaks_the_session(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    with attached_stream(filled, model, CONFIG) as attached:
        model(STREAM[:, :8])
        with monkeypatch.context() as full:
            full.setattr(Store, "append", refuse)
            with pytest.raises(CapacityError, match="file system is full"):
                attached.session.commit()
        with pytest.raises(StoreIOError, match="open the stream again"):
            model(STREAM[:, 8:])


def test_a_stream_whose_end_is_damaged_cannot_be_continued(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    fetch = Store.fetch

    def losing(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        report = fetch(self, requests, timeout_s)
        report.outcomes[-1] = Outcome.DAMAGED
        return report

    monkeypatch.setattr(Store, "fetch", losing)
    with pytest.raises(CorruptRecordError, match="cannot be continued"), attached_stream(filled, model, CONFIG):
        pass
