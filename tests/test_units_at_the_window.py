# SPDX-License-Identifier: Apache-2.0
"""Units that lie on both sides of the recent window: what comes before it can be chosen, and is read once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.segmenters.clusters import Clusters
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.units import Segmenter
from kvstore.session.stream_memory import StreamMemory
from tests.layer_tokens import layer_query, layer_tokens
from tests.tiny_models import attached_stream, make_model, policy, settings, token_ids

SEGMENTERS = [Pages(12), Clusters(4, 40)]


def memory_of(name: str, segmenter: Segmenter) -> LayerMemory:
    """Forty tokens in units."""
    memory = LayerMemory(replace(policy_named(name), segmenter=segmenter), 2, 16)
    memory.add(layer_tokens(40), is_end=True)
    return memory


@pytest.mark.parametrize(("name", "segmenter"), [*(("quest", each) for each in SEGMENTERS), ("rekv", Pages(12))])
@pytest.mark.parametrize("end", [0, 1, 11, 12, 13, 39, 40])
def test_with_room_for_everything_all_before_the_window_is_chosen(name: str, segmenter: Segmenter, end: int) -> None:
    chosen = memory_of(name, segmenter).select(layer_query(1), end, end)
    assert [tokens.tolist() for tokens in chosen.tokens] == [list(range(end))] * len(chosen.tokens)


def test_a_budget_counts_what_is_read_of_a_unit() -> None:
    memory = memory_of("quest", Pages(12))
    assert [tokens.shape[0] for tokens in memory.select(layer_query(1), 18, end=18).tokens] == [18, 18]
    assert [tokens.shape[0] in (6, 12) for tokens in memory.select(layer_query(1), 17, end=18).tokens] == [True, True]


def test_what_lies_on_both_sides_is_not_estimated() -> None:
    memory = memory_of("retroinfer", Clusters(4, 20))
    chosen = memory.select(layer_query(1), 8, end=24)
    ends = memory.table.ends
    assert sum(units.shape[0] for units in chosen.estimated) > 0
    assert all(bool((ends[head, units] <= 24).all()) for head, units in enumerate(chosen.estimated))


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_a_question_with_room_for_everything_sees_everything(segmenter: Segmenter, tmp_path: Path) -> None:
    model, rule = make_model(), policy("quest", segmenter=segmenter, recent_tokens=16, full_layers=0)
    with attached_stream(tmp_path, model, settings(rule, window=24, sinks=4)) as attached:
        for part in token_ids(160).split(40, dim=1):
            model(part)
        attached.session.commit()
        model(token_ids(5, seed=3), past_key_values=attached.question())
        assert attached.last.num_attended_tokens == 160


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_units_do_not_depend_on_when_questions_came(segmenter: Segmenter, tmp_path: Path) -> None:
    model, rule = make_model(), policy("quest", segmenter=segmenter, recent_tokens=0, full_layers=0)
    found = []
    for asks in (True, False):
        with attached_stream(tmp_path / str(asks), model, settings(rule, window=24, sinks=4)) as attached:
            for number, part in enumerate(token_ids(168).split(24, dim=1)):
                model(part)
                if asks or number == 6:
                    had = model(token_ids(5, seed=3), past_key_values=attached.question()).logits
                    assert attached.last.num_attended_tokens == 24 * (number + 1), "all can be found, cut or not"
            search = attached.session.view.search(rule)
            assert isinstance(search, StreamMemory)
            tables = [memory.table for memory in search._layers]
            found.append((had, [(table.tokens_of([torch.arange(table.num_units)]), table.sizes) for table in tables]))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one[1], other[1])
        assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
