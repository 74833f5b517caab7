# SPDX-License-Identifier: Apache-2.0
"""Questions that select again: the tokens that they have so far keep their distances to each other and to the past."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.session.attending import Attending, PlacedPast
from tests.session_oracle import rotated
from tests.tiny_models import attached_stream, make_model, policy, settings, token_ids


@pytest.mark.parametrize("position", PositionPolicy)
@pytest.mark.parametrize("is_shared", [True, False])
def test_a_selection_moves_the_past_and_not_the_tail(
    position: PositionPolicy, is_shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[PlacedPast] = []
    place_past = Attending.place_past

    def recording(self: Attending, *args: Any, **kwargs: Any) -> PlacedPast:
        wanted.append(place_past(self, *args, **kwargs))
        return wanted[-1]

    model, named = make_model(), policy("rekv", segmenter=Pages(6), trigger=EveryStep(), position=position)
    views = (replace(named.views[0], is_shared=is_shared),)
    config = settings(replace(named, views=views), window=24, sinks=4, budget=22)
    raw: list[torch.Tensor] = []
    layer = model.model.layers[0].self_attn
    with attached_stream(tmp_path, model, config) as attached:
        for part in token_ids(150).split(30, dim=1):
            model(part)
        attached.session.commit()
        monkeypatch.setattr(Attending, "place_past", recording)
        cache: Any = attached.question()
        layer.k_proj.register_forward_hook(lambda _module, _args, out: raw.append(out.view(1, 2, 16).transpose(0, 1)))
        for seed in range(8):
            model(token_ids(1, seed=seed), past_key_values=cache)
        branch, rotate = cache.branch, attached.session.view.rotate
    context, placed = branch.contexts[0], branch._placed[0]
    at = torch.arange(8) + placed.offset
    tail = context._keys[0, :, context.num_past : context.num_past + 8]
    torch.testing.assert_close(tail, rotated(rotate, torch.cat(raw, dim=1), at), atol=1e-5, rtol=1e-5)
    last = wanted[-3]  # of three layers
    there = torch.ones(1, 1, 1) if last.bias is None else last.bias[None, :, :].isfinite()
    if position is not PositionPolicy.ORIGINAL:  # there rows are replaced one by one
        assert torch.equal(*((each.offset - each.positions) * there for each in (placed, last)))
    num_offsets = len({each.offset for each in wanted[::3]})
    assert num_offsets > 1 or position not in (PositionPolicy.GROUP, PositionPolicy.PARALLEL)
