# SPDX-License-Identifier: Apache-2.0
"""Late interaction when something goes wrong, or is not as usual: interrupted, out of range, of several streams."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.engines.anatomy import rotation_of
from kvstore.retrieval.late.directory import Directory
from kvstore.retrieval.late.tail import Tail
from kvstore.retrieval.late.words import Vocabulary
from kvstore.retrieval.positions import PositionPolicy
from kvstore.session.contexts.view import ContextsView
from kvstore.session.late.ranking import LateRanking
from kvstore.store import Access, FetchReport, FetchRequest, Store
from tests.late_streams import CONFIG, KIND, RULE, STREAM, append, entries_of, keys_of, late, opened, same
from tests.tiny_models import BLOCK_TOKENS, make_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the stream; not to be changed."""
    path = tmp_path_factory.mktemp("written")
    append(path, STREAM)
    return path


def test_contexts_longer_than_a_piece_are_ranked_in_memory(written: Path, tmp_path: Path) -> None:
    model = make_model()
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    with opened(tmp_path, Access.WRITE) as store:
        store.fork("s", "u", 4 * BLOCK_TOKENS)
    for access in Access:
        with opened(tmp_path, access) as store:
            headers = [store.manifest(name).header for name in ("u", "s")]
            view = ContextsView(
                store, headers, CONFIG, PositionPolicy.PARALLEL, False, rotation_of(model), torch.device("cpu"), 1
            )
            ranking = view.search(CONFIG.policy)
            assert isinstance(ranking, LateRanking)
            ranking.refresh(view.num_sink_blocks, view.entries)
            assert len(view.entries) == 44
            question = keys_of(store, 30)[1:5]
            assert int(ranking.rank(question, 44).blocks[0]) == 30


@pytest.mark.parametrize(
    ("place", "access"),
    [
        ("Vocabulary.assign", Access.READ),
        ("Directory.add", Access.WRITE),
        ("Tail.take_until", Access.WRITE),
        ("Tail.add", Access.READ),
    ],
)
def test_what_is_interrupted_is_done_again(
    place: str, access: Access, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    with opened(tmp_path, Access.WRITE) as store:
        question = keys_of(store, 20)[1:5]
        wanted = late(store).rank(question, 44)
        stored = [store.read_object("s", KIND, number) for number in range(5)]
        store.drop_objects("s", KIND)
    with opened(tmp_path, access) as store:
        ranking = LateRanking(store, store.manifest("s").header, RULE)
        maker = {"Vocabulary": Vocabulary, "Directory": Directory, "Tail": Tail}[place.split(".")[0]]
        called = getattr(maker, place.split(".")[1])
        count = 0

        def interrupting(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            found = called(*arguments, **more)
            if count == 3:
                raise KeyboardInterrupt
            return found

        with monkeypatch.context() as patched:
            patched.setattr(maker, place.split(".")[1], interrupting)
            with pytest.raises(KeyboardInterrupt):
                ranking.refresh(1, entries_of(store))
        ranking.refresh(1, entries_of(store))
        had = ranking.rank(question, 44)
        assert int(had.blocks[0]) == 20
        if access is Access.WRITE:
            assert ranking.damaged == {}
            assert same(had, wanted)
            assert [store.read_object("s", KIND, number) for number in range(5)] == stored


def test_keys_that_are_too_large_are_a_block_that_is_not_found(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Store.fetch

    def spoiling(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        found = fetch(self, requests, timeout_s)
        for request in requests:
            if request.key == key:
                request.slot.view(torch.float32)[:] = 3e38
        return found

    with opened(written) as store:
        key = entries_of(store)[5].key
        question = keys_of(store, 20)[1:5]
        monkeypatch.setattr(Store, "fetch", spoiling)
        monkeypatch.setattr(Store, "read_objects", lambda self, name, kind, wanted: [[None]] * len(wanted))
        ranking = late(store)
        assert list(ranking.damaged) == [5]
        assert int(ranking.rank(question, 44).blocks[0]) == 20
