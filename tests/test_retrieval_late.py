# SPDX-License-Identifier: Apache-2.0
"""Parts of the late-interaction index: coded rows, words, pieces as bytes, weighted MaxSim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError, KVStoreError, UnsupportedFormatError
from kvstore.native import crc32c
from kvstore.retrieval.late import directory as directory_module
from kvstore.retrieval.late import words as words_module
from kvstore.retrieval.late.directory import Directory
from kvstore.retrieval.late.piece import PieceHead, pack_head, seal, unpack_head
from kvstore.retrieval.late.rows import TokenRows, directions_of, pack_rows, packed_nbytes, unpack_rows
from kvstore.retrieval.late.words import Vocabulary
from kvstore.retrieval.maxsim import maxsim

PARTS, DIM = 2, 24
WIDTH = PARTS * DIM


def rows(count: int, seed: int = 0) -> TokenRows:
    """Random rows."""
    noise = torch.randn(count, PARTS, DIM, generator=torch.Generator().manual_seed(seed))
    return TokenRows.of(torch.nn.functional.normalize(noise, dim=-1).flatten(1))


def piece(first_block: int = 3, directory: Directory | None = None) -> tuple[PieceHead, list[Tensor], list[TokenRows]]:
    """A piece of three blocks, of which the second was lost."""
    blocks = [rows(9, first_block), rows(0), rows(5, first_block + 2)]
    vocabulary = Vocabulary(DIM) if directory is None else directory.vocabulary
    return *seal(vocabulary, torch.rand(PARTS, DIM), first_block, blocks), blocks


def test_rows_survive_coding_and_packing() -> None:
    noise = torch.randn(50, WIDTH)
    coded = TokenRows.of(noise)
    assert (coded.decoded() - noise).abs().max() <= 0.51 * coded.scales.max()
    assert torch.allclose(coded.products(noise[:4]), noise[:4] @ coded.decoded().T, atol=1e-4)
    numbers = torch.arange(50) * 600
    data = pack_rows(coded, numbers)
    assert len(data) == packed_nbytes(50, WIDTH)
    found = unpack_rows(data, 50, WIDTH)
    assert found is not None
    assert torch.equal(found[0].codes, coded.codes)
    assert torch.equal(found[0].scales, coded.scales)
    assert torch.equal(found[1], numbers)


@pytest.mark.parametrize("num_rows", [0, 49, 51])
def test_rows_of_another_number_are_refused(num_rows: int) -> None:
    assert unpack_rows(pack_rows(rows(50), torch.zeros(50)), num_rows, WIDTH) is None


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, 3e38, -0.01])
def test_rows_whose_scales_are_no_directions_are_refused(scale: float) -> None:
    some = rows(5)
    some.scales[3] = scale
    assert unpack_rows(pack_rows(some, torch.zeros(5)), 5, WIDTH) is None
    head, _, _ = piece()
    head.new_words.scales[1] = scale
    with pytest.raises(CorruptRecordError, match="out of range"):
        unpack_head(pack_head(head), PARTS, DIM)


def test_keys_that_are_all_the_mean_are_one_word() -> None:
    vocabulary = Vocabulary(DIM)
    same = torch.full((600, PARTS, DIM), 0.75)
    found = vocabulary.assign(TokenRows.of(directions_of(same, same.mean(dim=0))))
    assert vocabulary.num_words == 1
    assert found.unique().tolist() == [0]
    vocabulary.assign(rows(20))
    assert vocabulary.assign(TokenRows.of(torch.zeros(3, WIDTH))).tolist() == [0] * 3


def test_rows_that_point_the_same_way_are_of_one_word() -> None:
    vocabulary = Vocabulary(DIM)
    some = rows(40)
    noisy = TokenRows.of(some.decoded() + 0.05 * torch.randn(40, WIDTH))
    found = vocabulary.assign(some)
    assert found.unique().shape[0] == vocabulary.num_words > 30
    num_words = vocabulary.num_words
    assert torch.equal(vocabulary.assign(noisy), found)
    assert vocabulary.num_words == num_words
    vocabulary.assign(rows(40, seed=1))
    assert vocabulary.num_words > num_words


def test_many_words_are_found_by_their_pivots() -> None:
    directions = torch.nn.functional.normalize(torch.randn(3000, 64, generator=torch.Generator().manual_seed(3)), dim=1)
    vocabulary = Vocabulary(64)
    some = TokenRows.of(directions)
    for part in range(0, 3000, 500):
        vocabulary.assign(TokenRows(some.codes[part : part + 500], some.scales[part : part + 500]))
    assert 2900 < vocabulary.num_words <= 3000
    assert vocabulary.num_words > words_module._NUM_PIVOTS * words_module._ROW_PIVOTS
    noisy = directions + 0.03 * torch.randn(3000, 64, generator=torch.Generator().manual_seed(4))
    found = vocabulary.assign(TokenRows.of(noisy))
    wanted = vocabulary.scores(torch.nn.functional.normalize(noisy, dim=1)).argmax(dim=1)
    assert (found == wanted).float().mean() > 0.95
    assert vocabulary.num_words < 3150


def test_a_full_vocabulary_gives_rows_to_the_nearest_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "MAX_WORDS", 8)
    vocabulary = Vocabulary(DIM)
    found = vocabulary.assign(rows(40))
    assert vocabulary.num_words == 8
    likeness = vocabulary.scores(torch.nn.functional.normalize(rows(40).decoded(DIM), dim=1))
    assert torch.equal(found, likeness.argmax(dim=1))
    with pytest.raises(CorruptRecordError, match="9 words"):
        vocabulary.extend(TokenRows(rows(1).codes[:, :DIM], torch.ones(1)))


def test_a_head_survives_packing() -> None:
    head, of_blocks, _ = piece()
    had = unpack_head(pack_head(head), PARTS, DIM)
    for name in ("mean", "rows_of_block", "counted", "counts", "postings_of_block"):
        assert torch.equal(getattr(had, name), getattr(head, name)), name
    assert had.postings.tolist() == [word for words in of_blocks for word in words.unique().tolist()]
    assert torch.equal(had.new_words.codes, head.new_words.codes)
    assert torch.equal(had.new_words.scales, head.new_words.scales)
    assert (had.first_block, had.end_block, had.words_before) == (3, 6, 0)
    assert pack_head(had) == pack_head(head)


def test_every_changed_byte_of_a_head_is_noticed() -> None:
    data = pack_head(piece()[0])
    for at in range(0, len(data), 7):
        with pytest.raises(CorruptRecordError):
            unpack_head(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :], PARTS, DIM)
    for end in (0, 3, 51, 52, len(data) - 1):
        with pytest.raises(CorruptRecordError):
            unpack_head(data[:end], PARTS, DIM)
    with pytest.raises(CorruptRecordError):
        unpack_head(data, PARTS, DIM + 1)


def resealed(data: bytes, at: int, value: bytes) -> bytes:
    """A head with other bytes and the checksum that fits them."""
    changed = data[:at] + value + data[at + len(value) :]
    return changed[:48] + crc32c(changed[52:], crc32c(changed[:48])).to_bytes(4, "little") + changed[52:]


def test_numbers_in_a_head_are_hostile() -> None:
    data = pack_head(piece()[0])
    with pytest.raises(UnsupportedFormatError, match="version 2"):
        unpack_head(resealed(data, 4, b"\x02"), PARTS, DIM)
    for at in (8, 12, *range(20, 48, 4)):
        for value in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00"):
            if data[at : at + 4] != value:
                with pytest.raises(KVStoreError):
                    unpack_head(resealed(data, at, value), PARTS, DIM)
    for at in range(52, len(data) - DIM * 14, 2):  # of arrays: refused, or usable
        for value in (b"\xff\xff", b"\x00\x00"):
            try:
                head = unpack_head(resealed(data, at, value), PARTS, DIM)
            except CorruptRecordError:
                continue
            Directory(DIM).add(head, is_stored=True)


def test_counted_words_that_there_are_not_are_refused() -> None:
    head, _ = seal(Vocabulary(DIM), torch.zeros(PARTS, DIM), 3, [rows(0)])
    head = replace(head, counted=torch.tensor([60_000]), counts=torch.tensor([0]))
    with pytest.raises(CorruptRecordError, match="out of range"):
        unpack_head(pack_head(head), PARTS, DIM)


def test_pieces_follow_each_other() -> None:
    directory = Directory(DIM)
    head, _, _ = piece(3, directory)
    directory.add(head, is_stored=False)
    second, _, _ = piece(6, directory)
    other = Directory(DIM)
    other.add(head, is_stored=True)
    with pytest.raises(CorruptRecordError, match="block 6 is next"):
        other.add(head, is_stored=True)
    other.add(second, is_stored=True)
    assert other.end_block == 9
    assert [other.num_rows(block) for block in range(3, 9)] == [9, 0, 5, 9, 0, 5]
    assert int(other.rows_of_word.sum()) == 28
    assert torch.equal(other.vocabulary.words_from(0).codes, directory.vocabulary.words_from(0).codes)


@pytest.mark.parametrize("num_made", [0, 5, 40])
def test_a_piece_made_again_with_other_words_spoils_no_later_one(num_made: int) -> None:
    directory = Directory(DIM)
    head, _, _ = piece(3, directory)
    directory.add(head, is_stored=False)
    second, of_blocks, blocks = piece(6, directory)
    other = Directory(DIM)
    other.vocabulary.assign(rows(num_made, seed=77))
    other.add(second, is_stored=True)
    assert other.vocabulary.num_words == second.words_before + second.new_words.num_rows
    likeness = other.vocabulary.scores(torch.nn.functional.normalize(blocks[0].decoded(DIM), dim=1))
    is_new = of_blocks[0] >= second.words_before
    assert bool(is_new.any())
    assert torch.equal(likeness.argmax(dim=1)[is_new], of_blocks[0][is_new])


def test_candidates_hold_the_words_of_the_question() -> None:
    directory = Directory(DIM)
    everything = [rows(8, seed) for seed in range(60)]
    for first in range(0, 60, 20):
        head, _ = seal(directory.vocabulary, torch.zeros(PARTS, DIM), first, everything[first : first + 20])
        directory.add(head, is_stored=False)
    for block in range(60):
        question = everything[block].decoded(DIM)[:4]
        found = directory.candidates(question, 5, 4, 60)
        assert block in found
        assert found == sorted(set(found))
        assert len(found) <= 4
    assert directory.candidates(question, 5, 4, 30) == [
        each for each in directory.candidates(question, 5, 4, 30) if each < 30
    ]
    assert directory.candidates(question, 5, 60, 60) == list(range(60))


def test_words_that_each_stand_in_many_blocks_tell_by_where_they_meet() -> None:
    directory = Directory(DIM)
    words = rows(128, seed=9)
    count = 2000
    chosen = [[(7 * block + 11 * place * place) % 128 for place in range(2)] for block in range(count)]
    chosen[1234] = [3, 18, 25, 31, 47, 60]
    blocks = [TokenRows(words.codes[each], words.scales[each]) for each in chosen]
    for first in range(0, count, 500):
        head, _ = seal(directory.vocabulary, torch.zeros(PARTS, DIM), first, blocks[first : first + 500])
        directory.add(head, is_stored=False)
    question = blocks[1234].decoded(DIM)
    assert 1234 in directory.candidates(question, 5, 4, count)
    assert 1234 not in directory.candidates(question, 5, 4, 1234)


def test_a_row_that_stands_for_many_brings_the_floor_nearer() -> None:
    similarity = torch.tensor([[0.9, 0.7, 0.5, 0.3]])
    blocks = torch.tensor([4, 4, 2, 7])
    numbers, scores = maxsim(similarity, blocks, torch.ones(4), 3)
    assert numbers.tolist() == [2, 4, 7]
    assert torch.allclose(scores, torch.tensor([0.0, 0.4, 0.0]))
    _, scores = maxsim(similarity, blocks, torch.tensor([1.0, 2.0, 1.0, 1.0]), 3)
    assert torch.allclose(scores, torch.tensor([0.0, 0.2, 0.0]))
    assert maxsim(similarity[:0], blocks, torch.ones(4), 3)[1].tolist() == [0.0] * 3


def test_words_that_stand_nearly_everywhere_are_not_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [rows(6, seed) for seed in range(400)]
    common = rows(2, 1000)
    blocks = [TokenRows.joined([each, common], WIDTH) for each in everything]
    found = []
    for many in (directory_module._MANY_BLOCKS, 128):
        monkeypatch.setattr(directory_module, "_MANY_BLOCKS", many)
        directory = Directory(DIM)
        for first in range(0, 400, 50):
            head, _ = seal(directory.vocabulary, torch.zeros(PARTS, DIM), first, blocks[first : first + 50])
            directory.add(head, is_stored=False)
        found.append([directory.candidates(blocks[at].decoded(DIM), 5, 4, 400) for at in range(0, 400, 9)])
        words = directory._postings._runs[0].num_words
    assert found[0] == found[1]
    assert all(at in each for at, each in zip(range(0, 400, 9), found[1], strict=True))
    assert words < 400 * 7.5, "of 8 words a block, two stand everywhere"
