# SPDX-License-Identifier: Apache-2.0
"""Late interaction over stored pieces: as good as over all rows, without reading keys, whatever is lost of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.retrieval.index.flat import FlatIndex
from kvstore.retrieval.maxsim import LateInteraction, MaxSimScorer, maxsim
from kvstore.session.late import ranking as ranking_module
from kvstore.session.late.ranking import LateRanking
from kvstore.spec import BlockKey
from kvstore.store import Access, FetchReport, FetchRequest, Store
from tests.late_streams import CONFIG, KIND, RULE, STREAM, append, entries_of, keys_of, late, opened, same
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, token_ids


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the stream; not to be changed."""
    path = tmp_path_factory.mktemp("written")
    append(path, STREAM)
    return path


def test_who_looks_at_every_block_ranks_as_over_all_rows(written: Path) -> None:
    with opened(written) as store:
        blocks = {block: keys_of(store, block) for block in range(1, 44)}
        mean = torch.cat([blocks[block] for block in range(1, 9)]).mean(dim=0)
        exact = MaxSimScorer(FlatIndex(mean.numel()), mean, RULE.hits_per_token)
        exact.add(blocks.items())
        everything = late(store, LateInteraction(hits_per_token=12, piece_tokens=64, num_candidates=100))
        for block in (3, 30, 42):
            question = keys_of(store, block)[2:6]
            had, wanted = everything.rank(question, 44), exact.rank(question, 44)
            assert int(had.blocks[0]) == block
            scores = torch.zeros(44)
            scores[had.blocks] = had.scores
            assert torch.allclose(scores[wanted.blocks], wanted.scores, atol=0.03)


def test_a_long_question_is_compared_in_batches_and_ranks_the_same(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def noting(similarity: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        compared.append(similarity.shape[0])
        return maxsim(similarity, *rest)

    with opened(written) as store:
        question = torch.cat([keys_of(store, block) for block in (3, 30, 31)] * 11)
        assert question.shape[0] > 4 * 64
        monkeypatch.setattr(ranking_module, "maxsim", noting)
        had = late(store).rank(question, 44)
        assert sum(compared) == question.shape[0]
        assert max(compared) <= 64
        monkeypatch.setattr(ranking_module, "_BATCH_TOKENS", question.shape[0])
        wanted = late(store).rank(question, 44)
        assert torch.allclose(had.scores, wanted.scores)
        assert had.blocks[:3].tolist() == wanted.blocks[:3].tolist()


def test_few_blocks_are_looked_at_and_the_right_one_is_among_them(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_objects = Store.read_objects
    num_parts = []

    def counting(self: Store, name: str, kind: str, wanted: Any) -> Any:
        num_parts.append(sum(len(parts) for _, parts in wanted))
        return read_objects(self, name, kind, wanted)

    with opened(written) as store:
        ranking = late(store)
        questions = {block: keys_of(store, block)[1:7] for block in range(1, 44)}
        monkeypatch.setattr(Store, "read_objects", counting)
        assert [int(ranking.rank(question, 44).blocks[0]) for question in questions.values()] == list(questions)
        assert set(num_parts) == {RULE.num_candidates}
        assert sorted(ranking.rank(questions[5], 44).blocks.tolist()) == list(range(44))
        assert int(ranking.rank(questions[20], 10).blocks.max()) == 9, "a question sees what was there when it began"


def test_who_asks_reads_keys_only_behind_the_last_piece(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Store.fetch
    fetched: set[BlockKey] = set()

    def counting(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        fetched.update(request.key for request in requests)
        return fetch(self, requests, timeout_s)

    with opened(written) as store:
        assert [each.num_blocks for each in store.objects("s", KIND)] == [9, 17, 25, 33, 41]
        question = keys_of(store, 20)
        monkeypatch.setattr(Store, "fetch", counting)
        late(store).rank(question, 44)
        assert fetched == {entry.key for entry in entries_of(store)[41:]}


def test_who_appends_reads_none_at_all_and_resumes_the_same_pieces(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Store.fetch
    searched: list[FetchRequest] = []

    def counting(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        searched.extend(request for request in requests if request.layers is not None)
        return fetch(self, requests, timeout_s)

    monkeypatch.setattr(Store, "fetch", counting)
    append(tmp_path, STREAM[:, : 20 * BLOCK_TOKENS])
    assert searched == []
    append(tmp_path, STREAM[:, 20 * BLOCK_TOKENS :])
    assert 0 < len({request.key for request in searched}) <= 3  # those behind the second piece
    with opened(written) as one, opened(tmp_path) as other:
        for number in range(5):
            assert one.read_object("s", KIND, number) == other.read_object("s", KIND, number)


def test_what_is_lost_of_an_index_is_made_of_keys(tmp_path: Path) -> None:
    append(tmp_path, STREAM)
    with opened(tmp_path) as store:
        question = keys_of(store, 20)[1:5]
        wanted = late(store).rank(question, 44)
    with opened(tmp_path, Access.WRITE) as store:
        stored = [store.read_object("s", KIND, number) for number in range(5)]
        assert store.drop_objects("s", KIND) == 5
    with opened(tmp_path) as store:
        ranking = late(store)
        assert len(ranking._in_memory) == 32, "the last piece may still come"
        assert int(ranking.rank(question, 44).blocks[0]) == 20
        assert store.objects("s", KIND) == [], "a reader keeps it to itself"
    with opened(tmp_path, Access.WRITE) as store:
        ranking = late(store)
        store.flush()
        assert same(ranking.rank(question, 44), wanted)
        assert [store.read_object("s", KIND, number) for number in range(5)] == stored


@pytest.mark.parametrize("spoilt", [None, b"", b"KVLP" + bytes(200)])
def test_a_damaged_piece_is_made_of_keys(spoilt: bytes | None, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_objects = Store.read_objects

    def spoiling(self: Store, name: str, kind: str, wanted: Any) -> Any:
        found = read_objects(self, name, kind, wanted)
        return [
            [spoilt] if index == 2 and parts == [0] else had for (index, parts), had in zip(wanted, found, strict=True)
        ]

    with opened(written) as store:
        question = keys_of(store, 20)[1:5]
        wanted = late(store).rank(question, 44)
        monkeypatch.setattr(Store, "read_objects", spoiling)
        ranking = late(store)
        assert same(ranking.rank(question, 44), wanted)
        assert ranking.damaged == {}


def test_a_block_whose_rows_are_damaged_is_not_found_and_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_objects = Store.read_objects

    def spoiling(self: Store, name: str, kind: str, wanted: Any) -> Any:
        found = read_objects(self, name, kind, wanted)
        return [
            [None if (index, part) == (2, 4) else data for part, data in zip(parts, had, strict=True)]
            for (index, parts), had in zip(wanted, found, strict=True)
        ]

    with opened(written) as store:
        question = keys_of(store, 20)[1:5]
        monkeypatch.setattr(Store, "read_objects", spoiling)
        ranking = late(store)
        had = ranking.rank(question, 44)
        scores = dict(zip(had.blocks.tolist(), had.scores.tolist(), strict=True))
        assert scores[20] == 0 < float(had.scores[0])
        assert list(ranking.damaged) == [20]


def test_a_lost_block_stays_out_of_its_piece_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, STREAM)
    fetch = Store.fetch

    def losing(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        found = fetch(self, requests, timeout_s)
        for number, request in enumerate(requests):
            if request.key == key:
                request.slot.view(torch.float32).fill_(torch.nan)
                found.reasons[number] = "lost"
        return found

    with opened(tmp_path, Access.WRITE) as store:
        key = entries_of(store)[20].key
        question = keys_of(store, 20)[1:5]
        store.drop_objects("s", KIND)
        monkeypatch.setattr(Store, "fetch", losing)
        late(store)
        store.flush()
    monkeypatch.undo()
    with opened(tmp_path) as store:
        ranking = late(store)
        assert list(ranking.damaged) == [20]
        assert int(ranking.rank(question, 44).blocks[0]) != 20


def test_a_reader_beside_a_writer_finds_what_one_that_comes_later_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, CONFIG) as attached:
        store = attached.session.view.store

        def reading() -> LateRanking:
            with monkeypatch.context() as patched:
                patched.setattr(Store, "is_writable", False)
                return LateRanking(store, store.manifest("s").header, RULE)

        ranking, num_pieces = reading(), 0
        for part in STREAM.split(2 * BLOCK_TOKENS, dim=1):
            model(part)
            attached.session.commit()
            attached.session.flush()
            entries = entries_of(store)
            later = reading()
            for each in (ranking, later):
                each.refresh(1, entries)
            question = keys_of(store, len(entries) // 2)[1:5]
            assert same(ranking.rank(question, len(entries)), later.rank(question, len(entries)))
            num_pieces = len(ranking._ends)
            assert ranking._in_memory == {}
        assert num_pieces == 5


def test_forks_share_pieces_and_rollbacks_drop_them(tmp_path: Path) -> None:
    append(tmp_path, STREAM)
    with opened(tmp_path, Access.WRITE) as store:
        question = keys_of(store, 12)[1:5]
        store.fork("s", "t", 20 * BLOCK_TOKENS)
        assert [each.num_blocks for each in store.objects("t", KIND)] == [9, 17]
        forked = late(store, name="t").rank(question, 20)
        store.rollback("s", 20 * BLOCK_TOKENS)
        assert [each.num_blocks for each in store.objects("s", KIND)] == [9, 17]
        assert same(late(store).rank(question, 20), forked)
        assert int(forked.blocks[0]) == 12
    append(tmp_path, token_ids(12 * BLOCK_TOKENS, seed=9))
    with opened(tmp_path) as store:
        assert [each.num_blocks for each in store.objects("s", KIND)] == [9, 17, 25]
        assert int(late(store).rank(keys_of(store, 22)[1:7], 32).blocks[0]) == 22
