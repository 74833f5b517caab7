# SPDX-License-Identifier: Apache-2.0
"""Windowed prefill: what each forward sees, against full attention under an explicit mask and explicit positions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvstore.errors import ConfigError, ReadOnlyError
from kvstore.session.attending import Attending, PlacedPast
from kvstore.session.reading.past import PastTokens
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.store import Access, FetchRequest
from tests.tiny_models import ALL, BLOCK_TOKENS, attached_stream, feed, make_model, policy, settings, token_ids

RULE = policy("maxsim")
IDS = token_ids(120)


def visible(cuts: list[int], window: int, sinks: int) -> Tensor:
    """Which token sees which, `[tokens, tokens]` bool, when forwards are cut at `cuts` and blocks are whole."""
    total = cuts[-1]
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    for begin, end in pairwise(cuts):
        whole = begin // BLOCK_TOKENS * BLOCK_TOKENS
        first = whole
        while first > 0 and begin - first < window:
            first -= BLOCK_TOKENS
        kept = min(-(-sinks // BLOCK_TOKENS) * BLOCK_TOKENS, first)
        mask[begin:end, kept:first] = False
    return mask


def dense(model: PreTrainedModel, ids: Tensor, cuts: list[int], mask: Tensor) -> Tensor:
    """Logits by recomputation, one forward at a time, keys closed up: the oracle.

    The keys that a forward sees lie right before it in time order, but each key was *computed* by its own forward under
    the same rule, so every layer keeps one unrotated key per token.
    """
    config: Any = model.config
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    groups = config.num_attention_heads // heads
    hidden = model.model.embed_tokens(ids)[0]
    rotary = model.model.rotary_emb

    def rotated(vectors: Tensor, positions: Tensor) -> Tensor:
        cos, sin = rotary(vectors, positions[None])
        half = torch.cat([-vectors[..., dim // 2 :], vectors[..., : dim // 2]], dim=-1)
        turned: Tensor = vectors * cos + half * sin
        return turned

    for layer in model.model.layers:
        normed = layer.input_layernorm(hidden)
        query = layer.self_attn.q_proj(normed).view(len(hidden), heads * groups, dim).transpose(0, 1)
        key = layer.self_attn.k_proj(normed).view(len(hidden), heads, dim).transpose(0, 1).repeat_interleave(groups, 0)
        value = layer.self_attn.v_proj(normed).view(len(hidden), heads, dim).transpose(0, 1)
        value = value.repeat_interleave(groups, 0)
        mixed = torch.zeros_like(hidden)
        for begin, end in pairwise(cuts):
            seen = torch.cat([mask[begin, :begin].nonzero()[:, 0], torch.arange(begin, end)])
            places = torch.arange(len(seen))
            logits = rotated(query[:, begin:end], places[-(end - begin) :]) @ rotated(key[:, seen], places).mT
            logits = (logits / dim**0.5).masked_fill(~mask[begin:end][:, seen], float("-inf"))
            out = (logits.softmax(dim=-1) @ value[:, seen]).transpose(0, 1).reshape(end - begin, -1)
            mixed[begin:end] = layer.self_attn.o_proj(out)
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = model.lm_head(model.model.norm(hidden))
    assert isinstance(logits, Tensor)
    return logits


def stored_planes(session: Session) -> list[Tensor]:
    """Every block's slot rows as the store has them: keys and values."""
    view, layout = session.view, session.view.layout
    view.store.flush()
    planes = []
    for entry in view.store.manifest("s").entries:
        slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
        view.store.fetch([FetchRequest(entry.key, slot, None)])
        planes.append(layout.keys(slot)[:, :, : entry.num_tokens].clone())
        planes.append(layout.values(slot)[:, :, : entry.num_tokens].clone())
    return planes


@pytest.mark.parametrize(
    ("window", "sinks"),
    [(8, 8), (16, 0), (24, 16), (20, 3), (1, 1), (8, 1000), (ALL, 8)],
    ids=lambda value: str(value),
)
def test_each_forward_sees_sinks_and_the_window(window: int, sinks: int, tmp_path: Path) -> None:
    model = make_model()
    chunks = (8, 16, 3, 5, 1, 23, 8, 40, 16)
    cuts = [0, *torch.tensor(chunks).cumsum(0).tolist()]
    with torch.no_grad():
        expected = dense(model, IDS, cuts, visible(cuts, window, sinks))
    with attached_stream(tmp_path, model, settings(RULE, window=window, sinks=sinks)):
        had = torch.cat(feed(model, IDS, chunks), dim=1)[0]
    assert torch.allclose(had, expected, atol=1e-5, rtol=1e-4)


def test_the_past_is_placed_once_per_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    placed: list[PastTokens] = []
    place_past = Attending.place_past

    def counted(self: Attending, past: PastTokens, *args: Any, **kwargs: Any) -> PlacedPast:
        placed.append(past)
        return place_past(self, past, *args, **kwargs)

    monkeypatch.setattr(Attending, "place_past", counted)
    with attached_stream(tmp_path, model, settings(RULE, window=8)):
        feed(model, IDS[:, :48], (16, 16, 16))
    assert len(placed) == 3


def test_the_oracle_has_teeth() -> None:
    model = make_model()
    cuts = [0, 40, 80]
    with torch.no_grad():
        narrow = dense(model, IDS[:, :80], cuts, visible(cuts, 8, 8))
        wide = dense(model, IDS[:, :80], cuts, visible(cuts, ALL, 8))
        assert torch.allclose(wide, model(IDS[:, :80]).logits[0], atol=1e-4)
    assert (narrow - wide).abs().max() > 0.1


def test_an_interrupted_stream_continues_bit_for_bit(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    config = settings(RULE, window=24, sinks=8)
    chunks = [16, 8, 24, 16, 8, 16, 32]
    with attached_stream(tmp_path / "whole", model, config) as attached:
        expected = feed(model, IDS, chunks)
        attached.session.commit({"at": 120})
        wanted = stored_planes(attached.session)
        keys = [entry.key for entry in attached.session.view.entries]
    had: list[Tensor] = []
    begin = 0
    for number, size in enumerate(chunks):  # closed and opened again before every forward
        with attached_stream(tmp_path / "parts", model, config) as attached:
            assert attached.session.num_tokens == begin
            assert attached.session.view.cursor.get("forward", 0) == number
            had.append(model(IDS[:, begin : begin + size]).logits)
            attached.session.commit({"forward": number + 1})
            attached.session.view.store.flush()
            begin += size
            if begin == 120:
                planes = stored_planes(attached.session)
                assert [entry.key for entry in attached.session.view.entries] == keys
    assert all(torch.equal(a, b) for a, b in zip(had, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(planes, wanted, strict=True))


def test_dropping_the_end_is_as_if_it_never_came(tmp_path: Path) -> None:
    model = make_model()
    config = settings(RULE, window=16, sinks=8)
    with attached_stream(tmp_path / "plain", model, config) as attached:
        feed(model, IDS[:, :60], (24, 13, 23))
        attached.session.commit(partial=True)
        wanted = stored_planes(attached.session)
    with attached_stream(tmp_path / "dropped", model, config) as attached:
        feed(model, IDS[:, :24], (24,))
        model(torch.cat([IDS[:, 24:37], token_ids(9, seed=8)], dim=1))
        attached.cache().crop(-9)
        assert attached.session.num_tokens == 37
        model(IDS[:, 37:60])
        attached.session.commit(partial=True)
        had = stored_planes(attached.session)
        with pytest.raises(ConfigError, match="not stored yet"):
            attached.session.drop(1)
    assert len(had) == len(wanted)
    for plane, other in zip(had, wanted, strict=True):
        assert torch.allclose(plane, other, atol=1e-5)


@pytest.mark.parametrize("name", ["maxsim", "infllm"])
def test_a_window_that_moves_back_holds_its_blocks_again(name: str, tmp_path: Path) -> None:
    model = make_model()
    rest = [token_ids(3, seed=seed) for seed in range(10, 30)]
    had = []
    for is_dropped in (False, True):
        config = settings(policy(name), window=20, sinks=8, budget=16)
        with attached_stream(tmp_path / str(is_dropped), model, config) as attached:
            model(IDS[:, :48])
            if is_dropped:
                model(IDS[:, 48:55])
                model(IDS[:, 55:56])  # sees less of what is stored
                attached.session.drop(8)
            had.append([model(part).logits for part in rest])
            view = attached.session.view
            free = view.residency.num_unpinned
            attached.session.commit(partial=True)
            view.residency.unpin([entry.key for entry in (*view.entries[:1], *attached.session._window.blocks)])
            assert view.residency.num_unpinned == view.residency.pool.num_slots > free, "nothing else was pinned"
    for logits, other in zip(*had, strict=True):
        assert torch.allclose(logits, other, atol=1e-5)


def test_announced_blocks_survive_a_drop(tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(RULE)) as attached:
        session = attached.session
        for number, size in enumerate((3, 5, 2)):
            session.segment(size, number, number + 1, number)
        model(IDS[:, :10])
        session.drop(6)
        model(IDS[:, 4:10])
        session.commit()
        assert [(entry.num_tokens, entry.group) for entry in session.view.entries] == [(3, 0), (5, 1), (2, 2)]
        with pytest.raises(ConfigError, match="must hold 1 to 8"):
            session.segment(9, 0.0, 1.0, 0)
        with pytest.raises(ConfigError, match="must hold 1 to 8"):
            session.segment(0, 0.0, 1.0, 0)


def test_a_forward_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    model = make_model()
    config = settings(RULE, window=16, sinks=8)
    with attached_stream(tmp_path / "plain", model, config) as attached:
        expected = feed(model, IDS[:, :60], (20, 40))
        attached.session.commit(partial=True)
        wanted = stored_planes(attached.session)
    with attached_stream(tmp_path / "failed", model, config) as attached:
        had = [model(IDS[:, :20]).logits]
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                model(token_ids(40, seed=6))
        cache = attached.question()
        with pytest.raises(ZeroDivisionError):
            model(token_ids(5, seed=6), past_key_values=cache)
        handle.remove()
        assert attached.session.num_tokens == 20
        answered = model(IDS[:, :5], past_key_values=cache).logits
        assert cache.get_seq_length() == 5
        assert torch.equal(answered, model(IDS[:, :5], past_key_values=attached.question()).logits)
        had.append(model(IDS[:, 20:60]).logits)
        attached.session.commit(partial=True)
        planes = stored_planes(attached.session)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(had, expected, strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(planes, wanted, strict=True))
    assert len(planes) == len(wanted)


def test_other_settings_and_readers_cannot_append(tmp_path: Path) -> None:
    model = make_model()
    with attached_stream(tmp_path, model, settings(RULE, window=16)) as attached:
        model(IDS[:, :20])
        attached.session.commit()
        attached.session.view.store.flush()
        header = attached.session.view.header
        with pytest.raises(ConfigError, match="was written with"):
            Session(
                attached.session.view.store,
                header,
                settings(RULE, window=24),
                attached.session.view.rotate,
                torch.device("cpu"),
            )
    with attached_stream(tmp_path, model, settings(RULE, window=16), Access.READ) as attached:
        assert attached.session.num_tokens == 16
        with pytest.raises(ReadOnlyError):
            model(IDS[:, 16:20])
        assert model(IDS[:, 16:20], past_key_values=attached.question()).logits.isfinite().all()


@pytest.mark.parametrize(
    "changes", [{"window_tokens": 0}, {"sink_tokens": -1}, {"budget_tokens": -1}, {"device_nbytes": -1}], ids=str
)
def test_senseless_settings_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        SessionConfig(policy=RULE, **changes)
