# SPDX-License-Identifier: Apache-2.0
"""Thinned streams of pictures: what repeats is not stored, and M-RoPE positions stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvstore.retrieval.retention.frames import FrameCarriers, NewFrames
from kvstore.retrieval.retention.thinning import Thinning
from tests.tiny_models import BLOCK_TOKENS, attached_stream, policy, settings, token_ids
from tests.tiny_vision_models import BEGIN, END, IMAGE, qwen2_vl

PROMPT = token_ids(7, seed=5)


def picture(model: Any, seed: int, first_position: int) -> dict[str, Tensor]:
    """A picture of 6 tokens between its marks, at its positions."""
    grid = torch.tensor([[1, 4, 6]])
    ids = torch.tensor([[BEGIN, *[IMAGE] * 6, END]])
    positions, _ = model.model.get_rope_index(
        input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=grid
    )
    pixels = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "position_ids": positions + first_position,
    }


@pytest.mark.parametrize(
    ("retention", "sizes"),
    [
        (NewFrames(0.99), [8, 1, 1, 8, 1, 2]),
        (FrameCarriers(2), [2, 2, 2, 2, 2, 3]),
    ],
    ids=["new frames", "carriers"],
)
def test_pictures_that_repeat_are_not_stored(retention: Any, sizes: list[int], tmp_path: Path) -> None:
    """A still scene, then another: M-RoPE positions stay what they were, and the stream's end with them."""
    model: PreTrainedModel = qwen2_vl()
    how = Thinning(retention, 1.0, 6 * BLOCK_TOKENS)
    config = settings(policy("streaming_llm", retention=how, recent_tokens=1000), window=24, sinks=4)
    ends = []
    with attached_stream(tmp_path, model, config) as attached:
        view = attached.session.view
        model(PROMPT)
        attached.session.commit(partial=True)
        for frame, seed in enumerate((1, 1, 1, 2, 2, 2)):
            attached.session.segment(8, frame, frame + 1.0, frame)
            model(**picture(model, seed, view.end_position))
            ends.append(view.end_position)
            if frame < 5:
                assert len(view.entries) == 1
            attached.session.commit()
        had = [entry.num_tokens for entry in view.entries[1:]]
        assert had[:-1] == sizes[:-1]
        assert 1 <= had[-1] <= sizes[-1], "the stream's last token stays"
        assert view.end_position == ends[-1]
        asked = model(PROMPT, past_key_values=attached.question()).logits
        assert attached.last.num_attended_tokens == 7 + sum(had)
        goes_on = model(PROMPT).logits
    with attached_stream(tmp_path, qwen2_vl(), config) as attached:
        assert torch.equal(attached.model(PROMPT, past_key_values=attached.question()).logits, asked)
        assert torch.equal(attached.model(PROMPT).logits, goes_on)
