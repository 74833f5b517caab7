# SPDX-License-Identifier: Apache-2.0
"""Contexts with pictures: grids of M-RoPE positions are placed side by side, or one behind the other, as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvstore
from kvstore.session.contexts.view import ContextsView
from tests.dense_contexts import opened
from tests.test_transformers_vision import grid_input
from tests.tiny_models import token_ids
from tests.tiny_vision_models import qwen2_vl

QUESTION = token_ids(6, seed=8)


@pytest.mark.parametrize("names", [["film", "text"], ["text", "film"]])
def test_a_film_and_a_text_are_asked_together(names: list[str], tmp_path: Path) -> None:
    model: Any = qwen2_vl()
    inputs = {"film": grid_input("video"), "text": {"input_ids": token_ids(20)}}
    caches: dict[str, Any] = {name: DynamicCache() for name in names}
    with opened(tmp_path, model) as store:
        for name in names:
            with kvstore.attach(model, store.stream(name)):
                model(**inputs[name])
            model.model.rope_deltas = None
            model(**inputs[name], past_key_values=caches[name])
        joined = DynamicCache()
        for layer in range(3):
            layers = [caches[name].layers[layer] for name in names]
            keys, values = (torch.cat([getattr(each, kind) for each in layers], dim=2) for kind in ("keys", "values"))
            joined.update(keys, values, layer)
        contexts = store.contexts(names, policy="rekv")
        with kvstore.attach(model, contexts) as attached:
            had = model(QUESTION, past_key_values=attached.question()).logits
            view = attached.session.view
            ends = [int(torch.cat([view.positions_of(entry) for entry in view.entries], dim=1).max()) + 1]
        one_by_one = store.contexts(names, policy="rekv", placed="consecutive")
        with kvstore.attach(model, one_by_one) as attached:
            view = attached.session.view
            assert isinstance(view, ContextsView)
            num_first = sum(entry.num_tokens for entry in view.entries[: view.ends[0]])
            positions = [view.positions_of(entry) for entry in view.entries]
            assert view.end_position == int(positions[-1].max()) + 1
    start = ends[0]
    assert start == 20, "the longer one's end"
    at = torch.arange(start, start + QUESTION.shape[1]).expand(3, 1, -1)
    model.model.rope_deltas = None
    with torch.no_grad():
        wanted = model(QUESTION, past_key_values=joined, position_ids=at).logits
    torch.testing.assert_close(had, wanted, atol=1e-4, rtol=1e-4)
    # One behind the other: the second begins where the first has ended, and its own grid is what it was.
    first, second = torch.cat(positions, dim=1).tensor_split([num_first], dim=1)
    assert int(second.min()) == int(first.max()) + 1
