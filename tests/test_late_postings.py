# SPDX-License-Identifier: Apache-2.0
"""Words of blocks, and what the blocks earn by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvstore.errors import ShapeError
from kvstore.native import score_postings
from kvstore.retrieval.late import postings as postings_module
from kvstore.retrieval.late.postings import Postings


def test_blocks_earn_the_best_word_of_each_token() -> None:
    chance = np.random.default_rng(5)
    gains = torch.randn(7, 300, generator=torch.Generator().manual_seed(5)) - 1.5
    gains[:, 299] = torch.nan
    sizes = [chance.integers(0, 30, 40), chance.integers(0, 3, 5), np.zeros(2, dtype=np.int64)]
    words = [chance.integers(0, 300, int(each.sum())).astype(np.uint16) for each in sizes]
    postings = Postings()
    for each, of_block in zip(words, sizes, strict=True):
        postings.add(each, torch.from_numpy(of_block))
    blocks = np.split(np.concatenate(words), np.concatenate(sizes).cumsum()[:-1])
    above = gains.nan_to_num(0).clamp_min(0)
    wanted = [float(above[:, block].amax(dim=1).sum()) if len(block) else 0.0 for block in blocks]
    assert torch.allclose(postings.earned(gains), torch.tensor(wanted), atol=1e-5)
    assert postings.earned(torch.zeros(2, 300)).tolist() == [0] * 47
    assert postings.earned(gains[:0]).tolist() == [0] * 47


def test_postings_go_on_in_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postings_module, "_RUN_WORDS", 8)
    postings = Postings()
    for first in range(0, 30, 3):
        postings.add(np.arange(first, first + 3, dtype=np.uint16), torch.tensor([1, 2]))
    postings.add(np.full(9, 29, dtype=np.uint16), torch.tensor([9]))
    wanted = [number for first in range(0, 30, 3) for number in (first, first + 2)]
    assert postings.earned(torch.arange(30.0)[None]).tolist() == [*wanted, 29]


def test_words_and_totals_that_do_not_fit_are_refused() -> None:
    postings, sizes = np.array([5, 65535, 0], dtype=np.uint16), np.array([1, 2], dtype=np.uint32)
    places, totals = np.zeros(65536, dtype=np.uint16), np.zeros(2, dtype=np.float32)
    places[[5, 65535]] = 1, 2
    starts, tokens = np.array([0, 1, 3], dtype=np.uint32), np.array([0, 0, 1], dtype=np.uint32)
    gains = np.array([0.5, 0.25, 2], dtype=np.float32)
    good = {"postings": postings, "sizes": sizes, "places": places, "starts": starts, "tokens": tokens, "gains": gains}

    def score(num_tokens: int = 2, totals: Any = totals, **changes: Any) -> list[float]:
        every = [np.ascontiguousarray(each).data for each in {**good, **changes}.values()]
        score_postings(every[0], every[1], (every[2], every[3], every[4], every[5]), num_tokens, totals.data)
        found: list[float] = totals.tolist()
        return found

    assert score() == [0.5, 2.25]
    over = places.copy()
    over[7] = 3
    for bad in (
        {"postings": postings[1:]},
        {"postings": postings.view(np.uint8)[1:]},
        {"sizes": np.array([1, 3], dtype=np.uint32)},
        {"sizes": np.array([2**32 - 1, 4], dtype=np.uint32)},
        {"places": places[1:]},
        {"places": over},
        {"starts": starts[:2]},
        {"starts": starts[:0]},
        {"starts": np.array([0, 3, 1], dtype=np.uint32)},
        {"starts": starts + 1},
        {"tokens": tokens[1:]},
        {"num_tokens": 1},
        {"totals": totals[1:]},
    ):
        with pytest.raises(ShapeError):
            score(**bad)
