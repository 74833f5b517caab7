# SPDX-License-Identifier: Apache-2.0
"""Questions that bring vectors of their own: what they say is fused with the model's keys, for every kind of policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.engines.transformers import Attached
from kvstore.errors import ConfigError, ShapeError
from kvstore.retrieval.external import ExternalVectors
from kvstore.retrieval.fusion import ExtraScores
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

STREAM = token_ids(160)
QUESTION = token_ids(5, seed=7)
NUM_BLOCKS = 20


def about(block: int) -> Tensor:
    """Scores of a retriever that has a vector for every second block, and is asked for the one of `block`."""
    vectors = torch.eye(NUM_BLOCKS)
    known = torch.arange(0, NUM_BLOCKS, 2)
    external = ExternalVectors(NUM_BLOCKS)
    external.add(known, vectors[known])
    return external.scores(vectors[block], NUM_BLOCKS)


def read(attached: Attached) -> None:
    """Append the stream, a second to each block."""
    for number in range(NUM_BLOCKS):
        attached.session.segment(BLOCK_TOKENS, float(number), number + 1.0, number)
    attached.model(STREAM)


@pytest.mark.parametrize("name", ["maxsim", "rekv", "quest", "louiskv"])
@pytest.mark.parametrize("block", [4, 12])
def test_a_block_that_an_external_retriever_insists_on_is_read(name: str, block: int, tmp_path: Path) -> None:
    model = make_model()
    config = settings(policy(name, full_layers=0, recent_tokens=0), window=24, sinks=4, budget=2 * BLOCK_TOKENS)
    with attached_stream(tmp_path, model, config) as attached:
        read(attached)
        attached.question(QUESTION, external=[ExtraScores(about(block), weight=100.0)])
        assert block * BLOCK_TOKENS in {span.first_token for span in attached.last.spans if span.is_attended}
        heavy = attached.last.spans
        attached.question(QUESTION, external=[ExtraScores(about(block), weight=0.0)])
        without = attached.last.spans
        attached.question(QUESTION)
        assert [span.first_token for span in without] == [span.first_token for span in attached.last.spans]
        assert heavy != without


def test_blocks_without_a_vector_are_found_all_the_same(tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(policy("maxsim"), window=24, sinks=4, budget=16)) as attached:
        read(attached)
        quoted = STREAM[:, 9 * BLOCK_TOKENS : 10 * BLOCK_TOKENS]
        attached.question(quoted, external=[ExtraScores(about(4), weight=1.0)])
        assert 9 * BLOCK_TOKENS in {span.first_token for span in attached.last.spans}


def test_scores_that_are_not_one_for_each_block_are_refused(tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(policy("maxsim"), window=24, sinks=4, budget=16)) as attached:
        read(attached)
        with pytest.raises(ShapeError, match="the stream has 20 blocks"):
            attached.question(QUESTION, external=[ExtraScores(torch.zeros(3))])


def test_scores_serve_a_question_while_the_stream_grows(tmp_path: Path) -> None:
    model = make_model()
    config = settings(policy("quest", full_layers=0, recent_tokens=0), window=24, sinks=4, budget=24)
    answers = []
    for grows in (False, True):
        with attached_stream(tmp_path / str(grows), model, config) as attached:
            read(attached)
            cache = attached.question(external=[ExtraScores(about(4), weight=100.0)])
            model(QUESTION, past_key_values=cache)
            if grows:
                model(token_ids(40, seed=9))
                model(QUESTION, past_key_values=attached.question())  # it makes the new blocks known
            answers.append(model(QUESTION[:, :1], past_key_values=cache).logits)
    assert torch.equal(*answers)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a number"):
        ExtraScores(torch.tensor([0.0, float("nan")]))
    ExtraScores(torch.tensor([-float("inf"), float("inf")]))
