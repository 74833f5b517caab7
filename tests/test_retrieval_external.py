# SPDX-License-Identifier: Apache-2.0
"""Vectors that a user brings: how they rank blocks, how they join a policy's own scores, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError
from kvstore.retrieval.external import ExternalVectors
from kvstore.retrieval.fusion import ExtraScores, ReciprocalRank
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.unit_table import UnitTable
from kvstore.retrieval.units import Units
from tests.layer_tokens import layer_query, layer_tokens

NONE = float("-inf")


def brought() -> ExternalVectors:
    """Block 0 looks east, block 1 north and a little east, block 3 west; block 2 has no vector."""
    vectors = ExternalVectors(2)
    vectors.add(torch.tensor([3, 0]), torch.tensor([[-5.0, 0.0], [2.0, 0.0]]))
    vectors.add(torch.tensor([1, 1]), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    return vectors


def test_blocks_score_by_the_best_cosine_of_their_vectors() -> None:
    scores = brought().scores(torch.tensor([3.0, 0.0]), 4)
    torch.testing.assert_close(scores, torch.tensor([1.0, math.sqrt(0.5), NONE, -1.0]))


def test_a_block_that_gets_its_vector_later_is_found_by_it() -> None:
    vectors = brought()
    vectors.add(torch.tensor([5]), torch.tensor([[0.0, 2.0]], dtype=torch.float16))
    assert vectors.num_vectors == 5
    assert int(vectors.scores(torch.tensor([0.0, 1.0]), 6).argmax()) in (1, 5)
    assert vectors.scores(torch.tensor([0.0, 1.0]), 6)[5] == 1


def test_without_vectors_nothing_is_known() -> None:
    assert ExternalVectors(3).scores(torch.ones(3), 2).tolist() == [NONE, NONE]


@pytest.mark.parametrize(
    ("blocks", "vectors", "error"),
    [
        (torch.tensor([0]), torch.ones(1, 3), ShapeError),
        (torch.tensor([0, 1]), torch.ones(1, 2), ShapeError),
        (torch.tensor([0.0]), torch.ones(1, 2), ShapeError),
        (torch.tensor([0]), torch.ones(1, 2, dtype=torch.int64), ShapeError),
        (torch.tensor([-1]), torch.ones(1, 2), ConfigError),
        (torch.tensor([0]), torch.tensor([[1.0, float("nan")]]), ConfigError),
        (torch.tensor([0]), torch.tensor([[float("inf"), 1.0]]), ConfigError),
        (torch.tensor([0]), torch.zeros(1, 2), ConfigError),
    ],
)
def test_what_cannot_be_compared_is_refused_and_not_added(blocks: Tensor, vectors: Tensor, error: type) -> None:
    held = brought()
    with pytest.raises(error):
        held.add(blocks, vectors)
    assert held.num_vectors == 4


def test_a_question_of_another_kind_or_of_another_stream_is_refused() -> None:
    held = brought()
    with pytest.raises(ShapeError, match=r"\[n, 2\]"):
        held.scores(torch.ones(3), 4)
    with pytest.raises(ConfigError, match="no direction"):
        held.scores(torch.zeros(2), 4)
    with pytest.raises(ConfigError, match=r"blocks \[3\], and the stream has 3"):
        held.scores(torch.ones(2), 3)


def test_a_unit_has_the_best_score_of_the_blocks_that_it_lies_in() -> None:
    table = UnitTable(2)
    one = Units(torch.tensor([0, 9, 1, 2, 3, 4, 5, 6, 7, 8]), torch.tensor([0, 2, 6, 10]))
    other = Units(torch.arange(10), torch.tensor([0, 4, 7, 10]))
    table.add([one, other])
    best = table.best_of_blocks(torch.tensor([0.1, NONE, 0.3]), torch.tensor([1, 5, 9]))
    torch.testing.assert_close(best, torch.tensor([[0.3, 0.1, NONE], [0.1, 0.1, 0.3]]))
    with pytest.raises(ShapeError):
        table.best_of_blocks(torch.zeros(2), torch.tensor([0, 5, 9]))


def test_units_without_a_vector_rank_last_alike_and_are_not_excluded() -> None:
    own = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    extra = torch.tensor([[NONE, 0.9, 0.1, NONE]])
    fused = ReciprocalRank(offset=0, weights=(1.0, 2.0)).fuse([own, extra])
    torch.testing.assert_close(fused, torch.tensor([[1 / 1 + 2 / 4, 1 / 2 + 2 / 1, 1 / 3 + 2 / 2, 1 / 4 + 2 / 4]]))


def test_an_external_retriever_moves_a_selection_by_its_weight() -> None:
    memory = LayerMemory(policy_named("quest"), 2, 16)
    memory.add(layer_tokens(320))
    query = layer_query(1)
    own = memory.score(query)
    worst = int(own.sum(0).argmin())
    wanted = torch.full((20,), NONE)
    wanted[worst] = 1.0

    ignored = memory.select(query, 32, extra=[ExtraScores(wanted, 0.0)])
    heeded = memory.select(query, 32, extra=[ExtraScores(wanted, 4.0)])
    plain = memory.select(query, 32)
    assert [units.tolist() for units in ignored.units] == [units.tolist() for units in plain.units]
    for head in range(2):
        assert worst in heeded.units[head].tolist()
        assert int(own[head].argmax()) in heeded.units[head].tolist()
    everything = memory.select(query, 320, extra=[ExtraScores(wanted)])
    assert all(units.tolist() == list(range(20)) for units in everything.units)


def test_extra_scores_of_other_units_and_of_no_weight_are_refused() -> None:
    memory = LayerMemory(policy_named("quest"), 2, 16)
    memory.add(layer_tokens(320))
    with pytest.raises(ShapeError, match="extra scores"):
        memory.select(layer_query(1), 32, extra=[ExtraScores(torch.zeros(19))])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="weigh"):
            ExtraScores(torch.zeros(20), weight)


def test_units_that_an_extra_list_scores_alike_are_parted_by_the_policys_own_scores() -> None:
    """A retriever of whole screens holds their blocks for equal: the order in which they came says nothing."""
    own = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    extra = torch.tensor([[0.1, 0.9, 0.9, 0.9]]).expand(2, -1)
    fused = ReciprocalRank(weights=(1.0, 50.0)).fuse([own, extra])
    assert fused.argsort(dim=1, descending=True).tolist() == [[3, 2, 1, 0], [1, 2, 3, 0]]
