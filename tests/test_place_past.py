# SPDX-License-Identifier: Apache-2.0
"""Where a past of several lists is placed, and what counts of it, in corners that questions rarely reach."""

from __future__ import annotations

from pathlib import Path

import torch

from kvstore.retrieval.estimates import Estimate
from kvstore.retrieval.positions import PositionPolicy
from kvstore.session.attending import Attending
from kvstore.session.reading.past import PastTokens
from tests.tiny_models import make_model, open_session, policy, settings


def past_of(numbers: torch.Tensor, num_far: int) -> PastTokens:
    """Rows of zeros."""
    rows = torch.zeros(2, numbers.shape[1], 16)
    return PastTokens(numbers, numbers.clamp_min(0)[None], num_far, {0: rows}, {0: rows}, frozenset())


def test_one_head_without_far_tokens_leaves_those_of_the_others_far(tmp_path: Path) -> None:
    with open_session(tmp_path, make_model(), settings(policy("maxsim"))) as session:
        view = session.view
        attending = Attending(view.residency, view.rotate, PositionPolicy.CONSTANT_FAR, 24, 1)
        past = past_of(torch.tensor([[-1, -1, 8, 9], [3, 5, 8, 9]]), num_far=2)
        placed = attending.place_past(past, [], num_stored=10, end=10, tail_start=0)
    assert placed.num_far == 2
    assert placed.positions[0, :, 2:].tolist() == [[8, 9], [8, 9]]


def test_what_estimates_add_lies_where_attention_runs(tmp_path: Path) -> None:
    with open_session(tmp_path, make_model(), settings(policy("maxsim"))) as session:
        view = session.view
        attending = Attending(view.residency, view.rotate, PositionPolicy.ORIGINAL, 0, 1)
        past = past_of(torch.tensor([[0, 1]]), num_far=0)
        placed = attending.place_past(past, [], num_stored=2, end=2, tail_start=0)
        estimate = Estimate(torch.zeros(2, 1, 16), torch.full((2, 1), 4.0), torch.zeros(2, 1, 16))
        with torch.device("meta"):  # stands for any device but that of the model
            attending.set_past(0, past, [], placed, estimate)
        bias = attending._placed[0].bias
    assert bias is not None
    assert bias.device.type == "cpu"
    assert bias.tolist() == [[0, 0, torch.tensor(4.0).log().item()]] * 2
