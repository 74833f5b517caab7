# SPDX-License-Identifier: Apache-2.0
"""Hybrid models: what a stream takes over ends where a state was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore
from kvstore.session.state import KIND
from kvstore.tiers.tables.objects import find_object
from kvstore.tiers.tables.streams import find_stream_id
from tests.dense_contexts import opened
from tests.test_hybrid_models import make_hybrid, num_saved, same, uninterrupted
from tests.test_prefix_sharing import damage
from tests.tiny_models import token_ids

TEXT = token_ids(44)


@pytest.fixture
def model() -> Any:
    return make_hybrid("qwen3-next")


def test_what_is_taken_over_ends_where_a_state_was_saved(model: Any, tmp_path: Path) -> None:
    with opened(tmp_path, model) as store:
        first = store.stream("first")
        for part in (TEXT[:, :16], TEXT[:, 16:40]):
            with kvstore.attach(model, first):
                model(part)
        other = torch.cat([TEXT[:, :32], token_ids(8, seed=5)], dim=1)
        stream = store.stream("new")
        assert stream.adopt_prefix(other[0]) == 16, "of 32 that are alike"
        assert num_saved(stream) == 16
        with kvstore.attach(model, stream):
            had = model(other[:, 16:]).logits
        assert same([had], uninterrupted(model, other, [16, 24])[1:])
        more = store.stream("more")
        assert more.adopt_prefix(TEXT[0, :16]) == 16
        assert more.adopt_prefix(TEXT[0, 16:]) == 24
        with kvstore.attach(model, more):
            had = model(TEXT[:, 40:]).logits
        assert same([had], uninterrupted(model, TEXT, [16, 24, 4])[2:])
        for name in ("first", "new"):
            store.blocks.remove_stream(name)
        assert num_saved(more) == 44
        assert store.blocks.verify().is_clean


def test_a_damaged_window_leaves_nothing_to_go_on_from(model: Any, tmp_path: Path) -> None:
    sizes: Any = {"window_tokens": 16, "sink_tokens": 4}
    with opened(tmp_path, model) as store:
        with kvstore.attach(model, store.stream("first", **sizes)):
            model(TEXT[:, :40])
        damage(store, "first", 4)
    with opened(tmp_path, model) as store:
        stream = store.stream("new", **sizes)
        assert stream.adopt_prefix(TEXT[0]) == 0
        assert num_saved(stream) is None
        with kvstore.attach(model, stream):
            assert model(TEXT).logits.isfinite().all()


def test_a_damaged_state_is_none_to_go_on_from(model: Any, tmp_path: Path) -> None:
    with opened(tmp_path, model) as store:
        first = store.stream("first")
        for part in (TEXT[:, :16], TEXT[:, 16:40]):
            with kvstore.attach(model, first):
                model(part)
        disk, entries = store.blocks._disk, store.blocks.manifest("first").entries
        with disk.catalogue.read() as view:
            row = find_object(view, find_stream_id(view, "first"), KIND, len(entries))
        assert row is not None
        (found,) = disk.look_up([row.body], [False])
        extent = found.record.extent  # type: ignore[union-attr]
        with disk.files.path(extent.file_id).open("r+b") as file:
            file.seek(extent.offset + extent.nbytes - 5000)
            file.write(bytes(800))
        stream = store.stream("new")
        assert stream.adopt_prefix(TEXT[0]) == 16, "the other state"
        with kvstore.attach(model, stream):
            assert same([model(TEXT[:, 16:]).logits], uninterrupted(model, TEXT, [16, 28])[1:])
