# SPDX-License-Identifier: Apache-2.0
"""Layers that select again read only what changed: answers are those of reading everything, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError
from kvstore.retrieval.triggers.ahead import Ahead
from kvstore.retrieval.triggers.stride import Stride
from kvstore.retrieval.triggers.trigger import EveryStep, Trigger
from kvstore.session.branch import Branch
from kvstore.session.reading.past import Reading
from kvstore.store import Entry
from tests.tiny_models import BLOCK_TOKENS, attached_stream, make_model, policy, settings, token_ids

STREAM = token_ids(160)
PROMPT = token_ids(5, seed=7)
BUDGET = 5 * BLOCK_TOKENS


def answers(path: Path, name: str, trigger: Trigger) -> list[torch.Tensor]:
    """Logits of a prompt and of a dozen decoded tokens."""
    model: Any = make_model()
    rule = policy(name, trigger=trigger, full_layers=0, recent_tokens=16, beyond=None)
    with attached_stream(path, model, settings(rule, window=24, sinks=4, budget=BUDGET)) as attached:
        model(STREAM)
        attached.session.commit()
        cache = attached.question()
        seen = [model(PROMPT, past_key_values=cache).logits]
        seen += [model(token_ids(1, seed=seed), past_key_values=cache).logits for seed in range(12)]
        assert {place.pins for place in attached.session.view.residency._places.values()} <= {0, 1}
        return seen


@pytest.mark.parametrize("name", ["auto", "quest", "arkvale", "shadowkv", "livevlm"])
@pytest.mark.parametrize("trigger", [EveryStep(), Ahead(Stride(2))])
def test_a_difference_answers_as_everything_does(
    name: str, trigger: Trigger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend: Any = Branch.attend_to_differences
    differences = []

    def counted(self: Branch, readings: dict[int, Reading]) -> Any:
        had = attend(self, readings)
        differences.extend(had)
        return had

    monkeypatch.setattr(Branch, "attend_to_differences", counted)
    some = answers(tmp_path / "some", name, trigger)
    assert len(differences) > 5, "a difference was enough"
    monkeypatch.setattr(Branch, "attend_to_differences", lambda *_: {})
    everything = answers(tmp_path / "all", name, trigger)
    for had, wanted in zip(some, everything, strict=True):
        torch.testing.assert_close(had, wanted, atol=1e-5, rtol=1e-5)


def test_a_past_that_lost_a_block_is_read_anew(tmp_path: Path) -> None:
    model: Any = make_model()
    rule = policy("quest", trigger=EveryStep(), full_layers=0, recent_tokens=16, beyond=None)
    with attached_stream(tmp_path, model, settings(rule, window=24, sinks=4, budget=BUDGET)) as attached:
        model(STREAM)
        cache = attached.question()
        branch = cache.branch
        assert branch is not None
        model(PROMPT, past_key_values=cache)
        view, near = attached.session.view, torch.arange(144, 160)
        positions_of: Any = view.positions_of

        def failing(entry: Entry) -> Tensor:
            if entry.first_token == 144:
                raise CorruptRecordError("lost")
            found: Tensor = positions_of(entry)
            return found

        view.has_positions = view.reader._has_positions = True
        view.positions_of = failing  # type: ignore[method-assign]
        branch.attend_to(branch, Reading((torch.arange(40),), near), range(1))
        assert branch.contexts[0].num_past == 40 + 8
        # As many rows as there are now: those of the lost block are not the last of the others.
        assert branch.attend_to_differences({0: Reading((torch.arange(32, 64),), near)}) == {}
