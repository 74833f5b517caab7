# SPDX-License-Identifier: Apache-2.0
"""Several layers that select in one call choose what each chooses by itself; a native choice is the strategies' own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.native import choose_units
from kvstore.retrieval.fusion import ExtraScores, StandardScores
from kvstore.retrieval.index.choice import choose_index
from kvstore.retrieval.memory import LayerMemory, Selection, select_together
from kvstore.retrieval.registry import policies, policy_named
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.selectors.budget import TokenBudget
from kvstore.retrieval.tokens import LayerQuery
from kvstore.retrieval.triggers.ahead import Ahead
from kvstore.retrieval.triggers.stride import Stride
from kvstore.retrieval.unit_choice import choose
from kvstore.retrieval.unit_table import UnitTable
from kvstore.retrieval.units import Units
from kvstore.session.residency import Residency
from kvstore.session.stream_memory import StreamMemory
from tests.layer_tokens import layer_query, layer_tokens
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

LAYERS = 3
CHOOSING = sorted(name for name, each in policies().items() if each.views)


def memories_of(name: str, num_tokens: int, *, is_shared: bool) -> list[LayerMemory]:
    """Layers with other keys each, which end in a short unit."""
    made: list[LayerMemory] = []
    for layer in range(LAYERS):
        table = made[0].table if made and is_shared else None
        made.append(LayerMemory(policy_named(name), 2, 16, layer=layer, table=table))
    for layer, memory in enumerate(made):
        memory.add(layer_tokens(num_tokens, seed=layer), is_end=True)
    return made


def check_alike(together: list[Selection], alone: list[Selection]) -> None:
    """The same of all that a selection says."""
    for had, wanted in zip(together, alone, strict=True):
        assert [each.tolist() for each in had.tokens] == [each.tolist() for each in wanted.tokens]
        assert [each.tolist() for each in had.units] == [each.tolist() for each in wanted.units]
        assert [each.tolist() for each in had.estimated] == [each.tolist() for each in wanted.estimated]
        assert torch.equal(had.chosen, wanted.chosen)
        torch.testing.assert_close(had.scores, wanted.scores)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("end", [None, 301])
def test_layers_together_choose_what_each_does_alone(name: str, end: int | None) -> None:
    is_shared = isinstance(policy_named(name).segmenter, Pages)
    memories = memories_of(name, 349, is_shared=is_shared)
    for number in range(2):
        queries = [layer_query(2, seed=10 + layer) for layer in range(LAYERS)]
        alone = [memory.select(query, 96, end) for memory, query in zip(memories, queries, strict=True)]
        check_alike(select_together(memories, LayerQuery.joined(queries), 96, end), alone)
        num_units = memories[0].table.num_units
        extra = [[ExtraScores(torch.rand(num_units), 0.5)] for _ in memories]
        each = zip(memories, queries, extra, strict=True)
        alone = [memory.select(query, 96, end, of_layer) for memory, query, of_layer in each]
        check_alike(select_together(memories, LayerQuery.joined(queries), 96, end, extra), alone)
        if number == 0:  # the stream grows
            for layer, memory in enumerate(memories):
                memory.add(layer_tokens(51, first=349, seed=20 + layer), is_end=True)
    assert any(each.tokens[0].numel() for each in alone)


def table_of(sizes: list[int]) -> UnitTable:
    """Pages of these sizes, from token 5 on."""
    table = UnitTable(2)
    table.add([Units.runs(5, sizes)])
    return table


@pytest.mark.parametrize("budget", [0, 1, 7, 8, 64, 10_000])
@pytest.mark.parametrize("end", [None, 5, 6, 100, 170, 10_000])
def test_a_native_choice_is_that_of_the_strategies(budget: int, end: int | None) -> None:
    table, chance = table_of([8] * 11 + [3, 8, 8, 1, 8, 8, 5, 8, 8]), torch.Generator().manual_seed(budget)
    views = [torch.randn(6, 20, generator=chance), 40 * torch.randn(2, 20, generator=chance) - 7]
    fusion = StandardScores(weights=(1.0, 0.75), neighbours=(0.0, 0.5))
    had = choose(fusion, TokenBudget(), views, table, end, budget)
    assert had is not None
    sizes = table.sizes if end is None else table.sizes_before(end)
    scores = fusion.fuse([views[0], views[1].repeat_interleave(3, dim=0)]).masked_fill(sizes == 0, float("-inf"))
    torch.testing.assert_close(had.scores, scores, atol=1e-5, rtol=1e-5)
    marks = TokenBudget().select(scores, sizes.where(sizes > 0, table.sizes).expand_as(scores), budget)
    assert torch.equal(had.marks, marks)
    units = [row.nonzero()[:, 0] for row in marks]
    assert [each.tolist() for each in had.units] == [each.tolist() for each in units]
    assert [each.tolist() for each in had.tokens] == [each.tolist() for each in table.tokens_of(units, end)]


def test_the_native_choice_leaves_what_it_does_not_do_to_the_strategies() -> None:
    table, fusion = table_of([8] * 4), StandardScores()
    views = [torch.randn(2, 4), torch.randn(2, 4)]
    assert choose(fusion, TokenBudget(), views, table, None, 16) is not None
    assert choose(fusion, TokenBudget(), views[:1], table, None, 16) is None
    assert choose(policy_named("shadowkv").fusion, TokenBudget(), views, table, None, 16) is None
    assert choose(fusion, policy_named("streamkv").selector, views, table, None, 16) is None
    for bad in (float("-inf"), float("nan"), 3e38):
        spoilt = views[0].clone()
        spoilt[1, 2] = bad
        assert choose(fusion, TokenBudget(), [spoilt, views[1]], table, None, 16) is None or bad == 3e38
    parted = UnitTable(2)
    parted.add([Units(torch.tensor([0, 2, 1, 3]), torch.tensor([0, 2, 4]))])
    assert choose(fusion, TokenBudget(), [torch.randn(2, 2)] * 2, parted, None, 16) is None


def native_call(**changes: Any) -> bool:
    """A call that fits, with some of it replaced."""
    parts: dict[str, Any] = {
        "views": [(torch.tensor([[3.0, 2.0, 1.0]] * 2), 1.0, 0.0)],
        "table": [torch.tensor([0, 4, 8]), torch.tensor([4, 4, 2]), torch.tensor([4, 4, 2]), torch.arange(10)],
        "num_lists": 2,
        "out": [
            torch.empty(2, 3),
            torch.empty(2, 3, dtype=torch.bool),
            *(torch.empty(2, count, dtype=torch.int64) for count in (3, 8, 2)),
        ],
        **changes,
    }

    def bytes_of(tensors: list[Tensor]) -> list[memoryview]:
        return [each.numpy().data for each in tensors]

    views = [(scores.numpy().data, weight, share) for scores, weight, share in parts["views"]]
    return choose_units(views, bytes_of(parts["table"]), 8, parts["num_lists"], bytes_of(parts["out"]))


def test_a_native_call_whose_parts_do_not_fit_is_refused() -> None:
    assert native_call()
    good = [torch.tensor([0, 4, 8]), torch.tensor([4, 4, 2]), torch.tensor([4, 4, 2]), torch.arange(10)]
    rooms = [torch.empty(2, 3), torch.empty(2, 3, dtype=torch.bool), *(torch.zeros(2, n).long() for n in (3, 8, 2))]
    for place, wrong in ((0, [0, 4, 9]), (0, [-1, 4, 8]), (1, [4, 4, 3]), (2, [5, 4, 2]), (2, [4, -1, 2]), (0, [0, 4])):
        with pytest.raises(ShapeError):
            native_call(table=[*good[:place], torch.tensor(wrong), *good[place + 1 :]])
    for place, room in ((0, torch.empty(2, 2)), (2, torch.zeros(2, 1).long()), (3, torch.zeros(2, 7).long())):
        with pytest.raises(ShapeError):
            native_call(out=[*rooms[:place], room, *rooms[place + 1 :]])
    for changes in (
        {"num_lists": 3},
        {"num_lists": 0},
        {"views": [(torch.randn(2, 4), 1.0, 0.0)]},
        {"views": [(torch.randn(0), 1.0, 0.0)]},
        {"table": good[:3]},
        {"out": rooms[:4]},
    ):
        with pytest.raises(ShapeError):
            native_call(**changes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("auto", kind) for kind in ("plain", "outside scores", "few slots", "growing")),
        *((name, "plain") for name in ("quest", "retroinfer", "livevlm")),
    ],
)
def test_answers_are_those_of_layers_that_take_turns(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = answers(tmp_path / "together", name, kind)

    def in_turns(self: StreamMemory, layers: Any, query: LayerQuery, budget: int, end: int, extra: Any) -> Any:
        parts = query.by_layer(len(layers))
        return [self.select(layer, part, budget, end, of) for layer, part, of in zip(layers, parts, extra, strict=True)]

    monkeypatch.setattr(StreamMemory, "select_together", in_turns)
    missing = Residency.missing
    monkeypatch.setattr(Residency, "missing", lambda self, keys, layer: list(keys) or missing(self, keys, layer))
    for had, wanted in zip(together, answers(tmp_path / "turns", name, kind), strict=True):
        torch.testing.assert_close(had, wanted, atol=1e-5, rtol=1e-5)


def answers(path: Path, name: str, kind: str) -> list[Tensor]:
    """Logits of a prompt and of decoded tokens."""
    model: Any = make_model()
    rule = policy(name, trigger=Ahead(Stride(2)), full_layers=0, recent_tokens=16, beyond=None)
    config = settings(rule, window=24, sinks=4, budget=4 * BLOCK_TOKENS)
    if kind == "few slots":
        config = replace(config, device_nbytes=0)
    with attached_stream(path, model, config) as attached:
        for part in token_ids(163).split(40, dim=1):
            model(part)
        attached.session.commit(partial=True)
        num_blocks = len(attached.session.view.entries)
        scores = torch.rand(num_blocks, generator=torch.Generator().manual_seed(3))
        cache = attached.question(external=[ExtraScores(scores)] if kind == "outside scores" else [])
        seen = [model(token_ids(5, seed=7), past_key_values=cache).logits]
        for seed in range(8):
            if kind == "growing" and seed in (2, 3):
                model(token_ids(19, seed=30 + seed))
            seen.append(model(token_ids(1, seed=seed), past_key_values=cache).logits)
        return seen


@pytest.mark.parametrize("num_rows", [0, 1, 1023, 1024, 1025])
def test_one_query_meets_all_rows_whatever_is_behind_the_last_segment(num_rows: int) -> None:
    index, chance = choose_index(2, 8), torch.Generator().manual_seed(num_rows)
    rows, queries = (torch.randn(2, count, 8, generator=chance) for count in (num_rows, 2))
    index.add(rows)
    alone = index.scores(queries[:, :1])
    assert alone.shape == (2, 1, num_rows)
    torch.testing.assert_close(alone, index.scores(queries)[:, :1])
    torch.testing.assert_close(alone, queries[:, :1] @ rows.transpose(1, 2), atol=0.2, rtol=0)
