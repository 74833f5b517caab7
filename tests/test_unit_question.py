# SPDX-License-Identifier: Apache-2.0
"""All views of a layer asked in one native call: what the strategies choose one after the other, or nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.native import UnitRows, limit_simd
from kvstore.retrieval.index.byte_rows import ByteCoding, ByteRows
from kvstore.retrieval.index.partitions import MatrixIndex
from kvstore.retrieval.index.segmented import SegmentedIndex
from kvstore.retrieval.memory import LayerMemory, MakeIndex, select_together
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.scorers.dot import Cosine
from kvstore.retrieval.tokens import LayerQuery, Space
from kvstore.retrieval.unit_choice import Chosen
from kvstore.retrieval.unit_question import UnitQuestions
from kvstore.retrieval.view import Group, Pool
from tests.layer_tokens import layer_query, layer_tokens, rotate

AUTO = policy_named("auto")


def short_segments(num_partitions: int, width: int) -> SegmentedIndex:
    """Of eight rows, so that few tokens are in several, and in a tail."""
    return SegmentedIndex(num_partitions, width, segment_rows=8)


def memory_of(num_tokens: int, make_index: MakeIndex = short_segments, policy: Policy = AUTO) -> LayerMemory:
    """A layer whose last tokens are in no unit yet."""
    memory = LayerMemory(policy, 2, 16, make_index)
    memory.add(layer_tokens(num_tokens))
    return memory


def asked(memory: LayerMemory, query: LayerQuery, end: int | None = None, budget: int = 64) -> Chosen | None:
    """What the native call chooses in a memory that shows nothing pending."""
    questions = UnitQuestions(memory.policy, memory.selector)
    return questions.choose([[index] for index in memory.indices], memory.table, query, end, budget)


@pytest.mark.parametrize("make_index", [short_segments, MatrixIndex])
@pytest.mark.parametrize(
    "policy", [AUTO, replace(AUTO, views=AUTO.views[::-1]), replace(AUTO, views=AUTO.views[1:] * 2)]
)
def test_one_call_chooses_what_the_strategies_do(make_index: MakeIndex, policy: Policy) -> None:
    memory = memory_of(8 * 21 + 5, make_index, policy)
    for num_shown in (0, 1):
        for end in (None, 150, 3):
            for budget in (0, 1, 8, 100, 10_000):
                query = layer_query(3, seed=budget)
                had, (wanted,) = memory.select(query, budget, end), select_together([memory], query, budget, end)
                assert [each.tolist() for each in had.tokens] == [each.tolist() for each in wanted.tokens]
                assert [each.tolist() for each in had.units] == [each.tolist() for each in wanted.units]
                assert torch.equal(had.chosen, wanted.chosen)
                torch.testing.assert_close(had.scores, wanted.scores, atol=1e-4, rtol=1e-4)
        assert had.scores.shape[1] == 21 + num_shown
        memory.show_pending()
    assert asked(memory_of(8 * 21, make_index, policy), query) is not None


def test_what_was_held_of_units_does_not_outlive_them() -> None:
    memory, query = memory_of(80), layer_query(1)
    for first in (80, 90, 121):
        memory.select(query, 16, 70)
        memory.show_pending()
        memory.select(query, 16, 70)
        memory.add(layer_tokens({80: 10, 90: 31, 121: 5}[first], first=first, seed=first))
        for end in (70, None, first + 1):
            had, (wanted,) = memory.select(query, 16, end), select_together([memory], query, 16, end)
            assert torch.equal(had.chosen, wanted.chosen)
            assert [each.tolist() for each in had.tokens] == [each.tolist() for each in wanted.tokens]
    best = int(had.scores[0].argmax())
    for index in memory.indices:
        assert isinstance(index, SegmentedIndex)
        index.remove(torch.tensor([best]))
    assert not memory.select(query, 16, end).chosen[0, best]


def interleaved(vectors: Tensor, positions: Tensor) -> Tensor:
    """Turns neighbours against each other, as some families do."""
    apart = torch.cat([vectors[..., ::2], vectors[..., 1::2]], dim=-1)
    turned = rotate(apart, positions)
    return torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)


def test_turns_are_the_rotation_bit_for_bit() -> None:
    spaces = (Space.FAR, Space.PLAIN, Space.ROTATED)
    query = layer_query(4)
    turns = query.last_turns(spaces)
    assert turns is not None
    for number, space in enumerate(spaces):
        wanted = query.in_space(space, slice(-1, None))[:, :, 0]
        last = query.query[:, :, -1]
        assert torch.equal(last * turns[number, 0] + last.roll(8, dims=-1) * turns[number, 1], wanted)
    assert replace(query, rotate=interleaved, turns={}).last_turns(spaces) is None
    assert replace(query, rotate=None, turns={}).last_turns((Space.ROTATED,)) is not None
    with pytest.raises(ConfigError):
        replace(query, rotate=None, turns={}).last_turns(spaces)


def test_what_it_does_not_do_is_left_to_the_strategies() -> None:
    query = layer_query(1)
    assert asked(memory_of(160), query) is not None
    assert asked(memory_of(160), query, budget=-1) is None
    assert asked(memory_of(160), replace(query, rotate=interleaved, turns={})) is None
    assert asked(memory_of(160), replace(query, query=query.query * float("nan"), turns={})) is None
    assert asked(memory_of(3), query) is None
    thinned = memory_of(160)
    assert isinstance(thinned.indices[1], SegmentedIndex)
    thinned.indices[1].remove(torch.tensor([4]))
    assert asked(thinned, query) is None
    first, second = AUTO.views
    for changed in (
        replace(first, pool=Pool.MEAN),
        replace(first, group=Group.SOFTMAX_MEAN),
        replace(first, summariser=second.summariser, scorer=Cosine()),
    ):
        assert asked(memory_of(160, policy=replace(AUTO, views=(changed, second))), query) is None
    changes: dict[str, Any]
    for changes in ({"views": AUTO.views[:1]}, {"fusion": policy_named("shadowkv").fusion}, {"estimated_share": 0.1}):
        assert asked(memory_of(160, policy=replace(AUTO, **changes)), query) is None


def test_every_machine_chooses_alike() -> None:
    memory, query = memory_of(8 * 21 + 5), layer_query(1)
    had = memory.select(query, 32)
    limit_simd("baseline")
    try:
        assert torch.equal(memory.select(query, 32).scores, had.scores)
    finally:
        limit_simd("avx512")


def native_call(**changes: Any) -> bool:
    """A call that fits, of two heads of four elements, and five units; with some of it replaced."""
    segment = ByteCoding().seal(torch.randn(2, 3, 8))
    assert isinstance(segment, ByteRows)
    tail = torch.randn(2, 6, 8)
    parts: dict[str, Any] = {
        "segments": [segment.native],
        "floats": [(tail.numpy().data, 2)],
        "is_bound": True,
        "queries": torch.randn(2, 3, 4),
        "factors": torch.ones(1, 2, 4),
        "shape": (2, 3, 4),
        "table": [torch.arange(5), torch.ones(5).long(), torch.ones(5).long(), torch.arange(5)],
        "out": [torch.empty(2, 5), torch.empty(2, 5).bool(), *(torch.empty(2, n).long() for n in (5, 5, 2))],
        **changes,
    }
    view = (parts["segments"], parts["floats"], parts["is_bound"], False, 1.0, 0.0)
    rows = UnitRows([view], [each.numpy().data for each in parts["table"]])
    queries, factors = (parts[name].numpy().data for name in ("queries", "factors"))
    return rows.choose(queries, factors, parts["shape"], 2, 2, 1, [each.numpy().data for each in parts["out"]])


def test_a_native_call_whose_parts_do_not_fit_is_refused() -> None:
    assert native_call()
    other = ByteCoding().seal(torch.randn(3, 3, 8))
    assert isinstance(other, ByteRows)
    tail = torch.randn(2, 6, 8).numpy().data
    refused: list[dict[str, Any]] = [
        {"segments": []},
        {"segments": [other.native]},
        {"floats": [(tail, 7)]},
        {"floats": [(tail, 3)]},
        {"floats": [(tail, -1)]},
        {"floats": [(torch.randn(2, 6, 7).numpy().data, 2)]},
        {"floats": [(torch.empty(4 * 96 + 1, dtype=torch.uint8).numpy()[1:].data, 2)]},
        {"is_bound": False},
        {"queries": torch.randn(2, 3, 5)},
        {"factors": torch.ones(2, 2, 4)},
        {"shape": (2, 2, 4)},
        {"shape": (0, 3, 4)},
        {"shape": (1 << 62, 3, 4)},
        {"table": [torch.arange(5)] * 3},
        {"table": [torch.arange(4), torch.ones(4).long(), torch.ones(4).long(), torch.arange(5)]},
        {"out": [torch.empty(2, 5)] * 4},
    ]
    for changes in refused:
        with pytest.raises((ShapeError, TypeError)):
            native_call(**changes)
