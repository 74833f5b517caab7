# SPDX-License-Identifier: Apache-2.0
"""Vision-language models: the text tower is attached, the vision tower is not; positions of three rows are replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvstore.engines.anatomy import decoder_of, position_rows, spec_of
from kvstore.engines.transformers import attach
from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.session.session import Session
from kvstore.store import Access, Store
from tests.tiny_models import ORIGINAL, attached_stream, open_session, policy, settings, token_ids
from tests.tiny_vision_models import (
    BEGIN,
    END,
    IMAGE,
    VIDEO,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)


def with_media(token: int, count: int) -> Tensor:
    """Text, media tokens, text."""
    ids = token_ids(3 + 2 + count + 4)
    ids[0, 3], ids[0, 4 : 4 + count], ids[0, 4 + count] = BEGIN, token, END
    return ids


def pixels(*shape: int) -> Tensor:
    """Random pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def grid_input(kind: str) -> dict[str, Any]:
    """A Qwen input with one image or video: a grid of patches, four to a token."""
    grid = (2, 4, 4) if kind == "video" else (1, 4, 6)
    patches = grid[0] * grid[1] * grid[2]
    token = VIDEO if kind == "video" else IMAGE
    ids = with_media(token, patches // 4)
    name = "pixel_values_videos" if kind == "video" else "pixel_values"
    return {
        "input_ids": ids,
        name: pixels(patches, 3 * 2 * 4 * 4),
        f"{kind}_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": torch.where(ids == token, 2 if kind == "video" else 1, 0),
    }


def frames_input(name: str, token: int, count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """An input of whole pictures."""
    return {"input_ids": with_media(token, count), name: pixels(*shape)}


CASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], dict[str, Any]]]] = {
    "qwen2_vl-video": (qwen2_vl, lambda: grid_input("video")),
    "qwen2_vl-image": (qwen2_vl, lambda: grid_input("image")),
    "qwen2_vl-text": (qwen2_vl, lambda: {"input_ids": token_ids(20)}),
    "qwen2_5_vl-video": (qwen2_5_vl, lambda: grid_input("video")),
    "qwen3_vl-image": (qwen3_vl, lambda: grid_input("image")),
    "llava_onevision-video": (
        llava_onevision,
        lambda: frames_input("pixel_values_videos", VIDEO, 2 * 4 + 1, (1, 2, 3, 16, 16)),
    ),
    "llava_onevision-text": (llava_onevision, lambda: {"input_ids": token_ids(20)}),
    "smolvlm-image": (smolvlm, lambda: frames_input("pixel_values", IMAGE, 2 * 4, (1, 2, 3, 16, 16))),
    "smolvlm-text": (smolvlm, lambda: {"input_ids": token_ids(20)}),
}
TEXT, QUESTION = token_ids(13, seed=8), token_ids(6, seed=9)


@pytest.mark.parametrize("case", CASES)
def test_media_stream_and_question_equal_the_engines_cache(case: str, tmp_path: Path) -> None:
    make, make_inputs = CASES[case]
    model, inputs = make(), make_inputs()
    own = DynamicCache()
    with torch.no_grad():
        expected = [
            model(**kwargs, past_key_values=own).logits
            for kwargs in (inputs, {"input_ids": TEXT}, {"input_ids": QUESTION}, {"input_ids": TEXT[:, :1]})
        ]
    model = make()  # knows nothing of what came before
    vision = model.config.vision_config
    tower = vision._attn_implementation
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        had = [model(**inputs).logits]
        assert vision._attn_implementation == tower != "kvstore"
        aside = model(QUESTION, past_key_values=attached.question()).logits
        had.append(model(TEXT).logits)
        cache = attached.question()
        had += [model(part, past_key_values=cache).logits for part in (QUESTION, TEXT[:, :1])]
        attached.session.commit(partial=True)
        view = attached.session.view
        if view.rows == 3 and "text" not in case:
            assert view.end_position < view.num_tokens
    assert model.config.text_config._attn_implementation == "sdpa"
    assert getattr(model.model, "rope_deltas", None) is None
    for part, wanted in zip(had, expected, strict=True):
        assert torch.equal(part, wanted)
    assert not torch.equal(aside, expected[2])
    model = make()
    with attached_stream(tmp_path, model, settings(ORIGINAL), Access.READ) as attached:
        cache = attached.question(QUESTION)
        again = [model(part, past_key_values=cache).logits for part in (QUESTION, TEXT[:, :1])]
    for part, wanted in zip(again, expected[2:], strict=True):
        assert torch.equal(part, wanted)


@pytest.mark.parametrize("case", ["qwen2_vl-video", "qwen2_5_vl-video", "llava_onevision-video", "smolvlm-image"])
def test_generate_on_a_media_stream(case: str, tmp_path: Path) -> None:
    make, make_inputs = CASES[case]
    model: Any = make()
    inputs = make_inputs()
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], QUESTION], dim=1)}
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, QUESTION.shape[1]))
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**whole, **how)[:, -6:]
    media_asked = model.generate(**inputs, **how)[:, -6:]
    model = make()
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        assert torch.equal(model.generate(**inputs, **how)[:, -6:], media_asked), "a picture in a question"
        model(**inputs)
        assert torch.equal(model.generate(QUESTION, **how)[:, -6:], expected)
        assert attached.session.num_tokens == inputs["input_ids"].shape[1]


def test_positions_of_three_rows_are_stored_and_cut_anywhere(tmp_path: Path) -> None:
    """Embeddings with positions of their own, cut in the middle of a picture; closed up nothing moves."""
    model = qwen2_vl()
    decoder: Any = decoder_of(model)
    embeds = pixels(1, 40, 64)
    grid = torch.stack([torch.full((24,), 4), 4 + torch.arange(24) // 6, 4 + torch.arange(24) % 6])
    text = torch.arange(4).expand(3, 4)
    positions = torch.cat([text, grid, torch.arange(10, 22).expand(3, 12)], dim=1)[:, None]
    cuts = (4, 9, 8, 11, 8)
    own = DynamicCache()
    parts = list(zip(embeds.split(cuts, dim=1), positions.split(cuts, dim=2), strict=True))
    with torch.no_grad():
        expected = [decoder(inputs_embeds=x, position_ids=p, past_key_values=own)[0] for x, p in parts]
    for number, rule in enumerate((ORIGINAL, policy("maxsim"))):
        config = settings(rule)
        with attached_stream(tmp_path / str(number), model, config) as attached:
            had = [decoder(inputs_embeds=x, position_ids=p)[0] for x, p in parts[:4]]
            attached.session.commit(partial=True)
            attached.session.view.store.flush()
            view = attached.session.view
            stored = torch.cat([view.positions_of(entry) for entry in view.entries], dim=1)
            assert torch.equal(stored, positions[:, 0, :32])
        with attached_stream(tmp_path / str(number), model, config) as attached:  # goes on after a restart
            had.append(decoder(inputs_embeds=parts[4][0], position_ids=parts[4][1])[0])
        for part, wanted in zip(had, expected, strict=True):
            assert torch.allclose(part, wanted, atol=1e-5)


def test_equal_pictures_have_equal_names(tmp_path: Path) -> None:
    """All media tokens share one id; their embeddings tell them apart."""
    keys = []
    for number, seed in enumerate((3, 3, 4)):
        model = qwen2_vl()
        inputs = grid_input("video")
        inputs["pixel_values_videos"] = torch.randn(32, 96, generator=torch.Generator().manual_seed(seed))
        with attached_stream(tmp_path / str(number), model, settings(ORIGINAL)) as attached:
            model(**inputs)
            attached.session.commit(partial=True)
            keys.append([entry.key for entry in attached.session.view.entries])
    assert keys[0] == keys[1]
    assert keys[0][-1] != keys[2][-1]


def test_plain_pictures_of_another_shape_have_another_name(tmp_path: Path) -> None:
    """A tower makes the same of every patch of one colour; where the patches lie is all that differs."""
    keys = []
    for grid in ((1, 4, 6), (1, 6, 4)):
        model, inputs = qwen2_vl(), grid_input("image")
        inputs |= {"pixel_values": torch.ones(24, 96), "image_grid_thw": torch.tensor([grid])}
        with attached_stream(tmp_path / str(grid), model, settings(ORIGINAL)) as attached:
            model(**inputs)
            attached.session.commit(partial=True)
            keys.append([entry.key for entry in attached.session.view.entries])
    assert keys[0][-1] != keys[1][-1]


def test_a_session_with_one_row_is_refused(tmp_path: Path) -> None:
    model = qwen2_vl()
    assert position_rows(model) == 3
    with open_session(tmp_path, model, settings(ORIGINAL)) as session:
        view = session.view
        flat = Session(view.store, view.header, view.config, view.rotate, torch.device("cpu"))
        with pytest.raises(ConfigError, match="rows=position_rows"), attach(model, flat):
            pass


@pytest.mark.parametrize("lost", [2, -1])
def test_an_unreadable_position_loses_its_block_only(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qwen2_vl()
    with attached_stream(tmp_path, model, settings(ORIGINAL)) as attached:
        model(**grid_input("video"))
        model(TEXT)
        attached.session.commit(partial=True)
        entry = attached.session.view.entries[lost]
    summaries = Store.summaries
    monkeypatch.setattr(
        Store,
        "summaries",
        lambda self, name, first, count: {
            index: b"" if index == entry.index else data for index, data in summaries(self, name, first, count).items()
        },
    )
    with attached_stream(tmp_path, model, settings(policy("streaming_llm")), Access.READ) as attached:
        assert model(QUESTION, past_key_values=attached.question()).logits.isfinite().all()
        assert list(attached.last.load.lost) == [entry.key]
        assert {place.pins for place in attached.session.view.residency._places.values()} == {0}
    with (
        attached_stream(tmp_path, model, settings(ORIGINAL)) as attached,
        pytest.raises(CorruptRecordError, match="is shorter than its header"),
    ):
        model(TEXT)  # what comes next would be computed from a past with a hole


def test_specs_name_the_text_tower() -> None:
    for make in (qwen2_vl, qwen2_5_vl, qwen3_vl, llava_onevision, smolvlm):
        spec = spec_of(make())
        assert (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim) == (3, 2, 16, 16)
