# SPDX-License-Identifier: Apache-2.0
"""What questions search by, kept beside a stream: loaded it chooses as if made from keys, and no key is read for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.engines.transformers import Attached
from kvstore.retrieval.segmenters.clusters import Clusters
from kvstore.retrieval.segmenters.frames import Scenes
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.session.stream_memory import StreamMemory
from kvstore.session.view import SessionConfig
from kvstore.spec import BlockKey
from kvstore.store import Access, FetchRequest, NewObject, Store
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

IDS, PROMPT = token_ids(1600), token_ids(7, seed=3)


def config(name: str = "quest", **changes: Any) -> SessionConfig:
    """Small reads of a policy."""
    return settings(policy(name, full_layers=0, recent_tokens=16, **changes), window=24, sinks=4, budget=32)


def append(attached: Attached, first: int, end: int) -> None:
    """Read tokens in forwards of 100, each a frame, and store them."""
    for start in range(first, end, 100):
        for size in (8,) * 12 + (4,):
            attached.session.segment(size, start / 100, start / 100 + 1, start // 100)
        attached.model(IDS[:, start : start + 100])
    attached.session.commit(partial=True)
    attached.session.flush()


def ask(attached: Attached) -> Tensor:
    """Logits of a question and a word of its answer."""
    cache = attached.question()
    parts = [attached.model(ids, past_key_values=cache).logits for ids in (PROMPT, PROMPT[:, :1])]
    return torch.cat(parts, dim=1)


def searched(attached: Attached) -> list[list[list[int]]]:
    """Units of each layer, by table."""
    view = attached.session.view
    memory = view.search(view.policy)
    assert isinstance(memory, StreamMemory)
    tables = [layer.table for layer in memory._layers]
    return [[table.sizes.flatten().tolist(), table._tokens.used.flatten().tolist()] for table in tables]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[BlockKey]:
    """Keys of the blocks that were fetched whole."""
    keys: list[BlockKey] = []
    fetch: Any = Store.fetch

    def counting(self: Store, requests: Sequence[FetchRequest], *args: Any) -> Any:
        keys.extend(request.key for request in requests if request.layers is None)
        return fetch(self, requests, *args)

    monkeypatch.setattr(Store, "fetch", counting)
    return keys


KINDS: dict[str, SessionConfig] = {
    "tail": config(),
    "segments": config(segmenter=Pages(1)),
    "tables of heads": config("louiskv", segmenter=Clusters(3, 60)),
    "estimates": config("retroinfer", segmenter=Clusters(4, 40)),
    "layers cut apart": config("streamkv", segmenter=Scenes(threshold=0.2, least_frames=1, most_frames=3)),
    "two views": config("auto", beyond=None, segmenter=Pages(2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_chooses_what_keys_would(
    kind: str, fetched: list[BlockKey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, how = make_model(), KINDS[kind]
    with attached_stream(tmp_path, model, how) as attached:
        append(attached, 0, 1200)
    found = []
    for is_kept in (True, False):
        with monkeypatch.context() as patch, attached_stream(tmp_path, model, how, Access.READ) as attached:
            if not is_kept:
                patch.setattr(Store, "objects", lambda *_: [])
            view = attached.session.view
            fetched.clear()
            view.search(view.policy).refresh(view.num_sink_blocks, view.entries)
            found.append((len(fetched), ask(attached), searched(attached)))
    (few, had, units), (all_blocks, wanted, others) = found
    assert all_blocks == len(view.entries) - view.num_sink_blocks
    assert few <= 4 * 13, "what was in no unit yet"
    assert units == others
    assert torch.equal(had, wanted)


def test_what_comes_behind_is_read_from_its_keys(
    fetched: list[BlockKey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, how = make_model(), config(segmenter=Pages(1))
    kinds: set[str] = set()
    put = Store.put_objects

    def noting(self: Store, name: str, objects: Sequence[NewObject], *, may_drop: bool) -> None:
        kinds.update(each.kind for each in objects)
        put(self, name, objects, may_drop=may_drop)

    monkeypatch.setattr(Store, "put_objects", noting)
    with attached_stream(tmp_path, model, how) as attached:
        append(attached, 0, 1200)
        append(attached, 1200, 1600)  # too little to be kept anew
        wanted, units = ask(attached), searched(attached)
        view = attached.session.view
        kind = next(iter(kinds))
        (tail, whole) = view.store.objects("s", kind)
        assert (tail.index, whole.index) == (0, 1)
        assert tail.num_blocks == whole.num_blocks
        new = [entry.key for entry in view.entries[tail.num_blocks :]]
        assert len(new) >= 400 // BLOCK_TOKENS
    fetched.clear()
    with attached_stream(tmp_path, model, how, Access.READ) as attached:
        attached.session.view.search(how.policy).refresh(1, attached.session.view.entries)
        assert fetched == new
        assert torch.equal(ask(attached), wanted)
        assert searched(attached) == units


def test_a_writer_that_asks_keeps_what_others_search_by(fetched: list[BlockKey], tmp_path: Path) -> None:
    model, how = make_model(), config()
    with attached_stream(tmp_path, model, settings(policy("maxsim"), window=24, sinks=4)) as attached:
        append(attached, 0, 1200)
    with attached_stream(tmp_path, model, how, Access.READ) as attached:
        fetched.clear()
        wanted = ask(attached)
        assert len(fetched) > 150, "a reader keeps nothing"
    with attached_stream(tmp_path, model, how) as attached:
        assert torch.equal(ask(attached), wanted)
        attached.session.flush()
    with attached_stream(tmp_path, model, how, Access.READ) as attached:
        fetched.clear()
        assert torch.equal(ask(attached), wanted)
        assert len(fetched) < 20


def test_what_is_damaged_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, how = make_model(), config(segmenter=Pages(1))
    with attached_stream(tmp_path, model, how) as attached:
        append(attached, 0, 1200)
        wanted = ask(attached)
    read: Any = Store.read_object

    def flipped(data: bytes, place: int) -> bytes:
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    for damage in (
        lambda _: None,
        lambda data: flipped(data, 8),
        lambda data: flipped(data, 200),
        lambda data: data[:99],
    ):

        def damaged(self: Store, name: str, kind: str, index: int, damage: Any = damage) -> list[bytes | None]:
            found: list[bytes | None] = read(self, name, kind, index)
            assert all(found)
            return [found[0], damage(found[1]), *found[2:]] if index == 0 else found

        monkeypatch.setattr(Store, "read_object", damaged)
        with attached_stream(tmp_path, model, how, Access.READ) as attached:
            assert torch.equal(ask(attached), wanted)
            assert attached.session.view.damaged == {}


def test_a_rollback_leaves_what_describes_no_more_than_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, how = make_model(), config(segmenter=Pages(1))
    with attached_stream(tmp_path, model, how) as attached:
        append(attached, 0, 1100)
        append(attached, 1100, 1600)
        attached.session.view.store.rollback("s", 1200)
    found = []
    for is_kept in (True, False):
        with attached_stream(tmp_path, model, how, Access.READ) as attached:
            if not is_kept:
                monkeypatch.setattr(Store, "objects", lambda *_: [])
            found.append((ask(attached), searched(attached)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_what_found_no_room_is_kept_the_next_time(
    fetched: list[BlockKey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, how = make_model(), config(segmenter=Pages(1))
    with attached_stream(tmp_path, model, how) as attached:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "put_objects", lambda *_, **__: None)
            append(attached, 0, 1200)
        attached.model(token_ids(1200, seed=9))
        attached.session.commit(partial=True)
        attached.session.flush()
    fetched.clear()
    with attached_stream(tmp_path, model, how, Access.READ) as attached:
        attached.session.view.search(how.policy).refresh(1, attached.session.view.entries)
        assert len(fetched) < 40


def test_units_of_other_tokens_are_none_of_those_that_were_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, how = make_model(), config(segmenter=Pages(1))
    with attached_stream(tmp_path, model, how) as attached:
        append(attached, 0, 1200)
        entries, store = attached.session.view.entries, attached.session.view.store
        store.fork("s", "before")  # where the blocks stay
        store.rollback("s", 0)
    found = []
    with attached_stream(tmp_path, model, how) as attached:
        attached.model(IDS[:, :1200].flip(1))
        attached.session.commit(partial=True)
        attached.session.flush()
        for _ in ("kept", "keys"):
            memory = attached.session.view.new_memory(how.policy)
            memory.refresh(1, entries)
            assert memory.damaged == {}
            found.append([layer.indices[0].scores(torch.ones(2, 1, 32)) for layer in memory._layers])
            monkeypatch.setattr(Store, "objects", lambda *_: [])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_nothing_is_kept_of_a_stream_that_lost_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, how = make_model(), config()
    with attached_stream(tmp_path, model, settings(policy("maxsim"), window=24, sinks=4)) as attached:
        append(attached, 0, 1200)
        lost = attached.session.view.entries[30].key
    monkeypatch.setattr(Store, "put_objects", lambda *_, **__: pytest.fail("kept"))
    fetch: Any = Store.fetch

    def losing(self: Store, requests: Sequence[FetchRequest], *args: Any) -> Any:
        had = [each._replace(key=BlockKey(bytes(32))) if each.key == lost else each for each in requests]
        return fetch(self, had, *args)

    monkeypatch.setattr(Store, "fetch", losing)
    with attached_stream(tmp_path, model, how) as attached:
        ask(attached)
        assert list(attached.session.view.damaged) == [30]


def test_what_is_put_anew_while_it_is_read_is_read_again(
    fetched: list[BlockKey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, how = make_model(), config()
    with attached_stream(tmp_path, model, how) as attached:
        append(attached, 0, 1200)
    calls: list[int] = []
    read: Any = Store.read_object

    def replaced(self: Store, name: str, kind: str, index: int) -> list[bytes | None]:
        calls.append(index)
        found: list[bytes | None] = read(self, name, kind, index)
        return [] if len(calls) == 1 else found

    monkeypatch.setattr(Store, "read_object", replaced)
    with attached_stream(tmp_path, model, how, Access.READ) as attached:
        view = attached.session.view
        fetched.clear()
        view.search(how.policy).refresh(view.num_sink_blocks, view.entries)
        assert calls == [0, 0]
        assert len(fetched) < 20
