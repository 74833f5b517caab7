# SPDX-License-Identifier: Apache-2.0
"""Contexts under an attention layer of one's own, and contexts whose streams go away while they are asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvstore
from kvstore.errors import ConfigError, ReadOnlyError
from kvstore.session.stream import Stream
from tests.dense_contexts import NAMES, QUESTION, dense, opened
from tests.test_face import CPU, open_folder, still
from tests.tiny_models import make_model, token_ids

SIZES = {"a": 13, "b": 24}
SCALE = 0.25


def made(name: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values of a context or a question in one layer."""
    chance = torch.Generator().manual_seed(layer + 10 * len(name) + ord(name[0]))
    count = SIZES.get(name, 3)
    query, keys, values = (torch.randn(1, heads, count, 16, generator=chance) for heads in (2, 1, 1))
    return query, keys, values


def forward(stream: Stream, name: str) -> Tensor:
    out = torch.empty(0)
    for layer in range(2):
        query, keys, values = made(name, layer)
        at = torch.arange(keys.shape[2]).view(1, 1, -1)
        out = stream.attend(layer, query, keys, values, at, ids=at[0, 0] + 100 * ord(name[0]), scale=SCALE)
    return out


@pytest.mark.parametrize("placed", ["parallel", "consecutive"])
def test_an_attention_layer_of_ones_own_asks_contexts(placed: str, tmp_path: Path) -> None:
    with open_folder(tmp_path) as store:
        for name in SIZES:
            stream = store.stream(name)
            stream.bind(still, CPU)
            forward(stream, name)
            stream.commit()
        contexts = store.contexts(list(SIZES), policy="rekv", placed=placed)
        with pytest.raises(ConfigError, match="not bound"), contexts.recalling():
            pass
        contexts.bind(still, CPU)
        with pytest.raises(ReadOnlyError, match="a, b are read together"):
            forward(contexts, "question")
        with contexts.recalling():
            forward(contexts, "question")
        with contexts.asking():
            had = forward(contexts, "question")
        assert contexts.last.num_attended_tokens == 13 + 24
    query, *_ = made("question", 1)
    keys, values = (torch.cat([made(name, 1)[part] for name in (*SIZES, "question")], dim=2) for part in (1, 2))
    mask = torch.ones(3, 13 + 24 + 3, dtype=torch.bool).tril(13 + 24)
    logits = (query @ keys.transpose(-1, -2) * SCALE).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(had, logits.softmax(dim=-1) @ values, atol=1e-5, rtol=1e-4)


def test_a_stream_that_is_removed_under_a_question_is_a_miss(tmp_path: Path) -> None:
    model, documents = make_model(), [token_ids(count, seed=count) for count in (24, 16, 9)]
    with opened(tmp_path, model) as store:
        for name, ids in zip(NAMES, documents, strict=True):
            with kvstore.attach(model, store.stream(name)):
                model(ids)
        contexts = store.contexts(NAMES, policy="rekv")
        with kvstore.attach(model, contexts) as attached:
            store.blocks.remove_stream("b")
            had = model(QUESTION, past_key_values=attached.question()).logits
        assert {name: len(reasons) for name, reasons in contexts.lost.items()} == {"b": 2}
        seen = [*range(24), *range(40, 49)]
        wanted = dense(model, [(ids, 0) for ids in documents], documents[0][:, :0], seen=seen)
    torch.testing.assert_close(had, wanted, atol=1e-4, rtol=1e-4)
