# SPDX-License-Identifier: Apache-2.0
"""Streams that begin alike, under a model: forked, rolled back, sharing unasked, and taking over what others hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvstore
from kvstore.errors import ConfigError, ReadOnlyError, ShapeError
from kvstore.face import KVStore
from kvstore.session.stream import Stream
from kvstore.store import Outcome
from tests.dense_contexts import opened
from tests.tiny_models import BLOCK_TOKENS, make_model, token_ids

TEXT, OTHER = token_ids(44), token_ids(20, seed=7)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def read(model: Any, stream: Stream, ids: Tensor) -> Tensor:
    """Let the model read on; the logits, and all that was read is stored."""
    with kvstore.attach(model, stream):
        logits: Tensor = model(ids).logits
    return logits


def keys(store: KVStore, name: str) -> list[bytes]:
    return [entry.key for entry in store.blocks.manifest(name).entries]


def damage(store: KVStore, name: str, block: int) -> None:
    """Overwrite a block on disk, and forget it in memory."""
    (found,) = store.blocks._disk.look_up([store.blocks.manifest(name).entries[block].key], [False])
    extent = found.record.extent  # type: ignore[union-attr]
    with store.blocks._disk.files.path(extent.file_id).open("r+b") as file:
        file.seek(extent.offset + 1000)
        file.write(bytes(100))


@pytest.mark.parametrize("window", [1024, 2 * BLOCK_TOKENS])
def test_a_fork_and_a_rollback_go_on_as_a_run_from_the_start(window: int, model: Any, tmp_path: Path) -> None:
    with opened(tmp_path, model) as store:
        first = store.stream("first", window_tokens=window, sink_tokens=4)
        read(model, first, TEXT[:, :32])
        fork = first.fork("fork", at=16)
        # The model's forwards are cut alike, as what lies outside of the window depends on it.
        alone = store.stream("alone", window_tokens=window, sink_tokens=4)
        read(model, alone, TEXT[:, :16])
        wanted = read(model, alone, OTHER)
        assert torch.equal(read(model, fork, OTHER), wanted)
        assert keys(store, "fork") == keys(store, "alone")
        assert keys(store, "first")[:2] == keys(store, "fork")[:2]
        # Rolled back behind the fork, and read on as if the fork's text had come first.
        first.rollback(16)
        assert torch.equal(read(model, first, OTHER), wanted)
        assert store.blocks.stats().num_blocks == 5, "16 tokens and 20, in blocks of 8, of three streams"
        if window == 1024:
            dense = model(torch.cat([TEXT[:, :16], OTHER], dim=1)).logits[:, 16:]
            torch.testing.assert_close(wanted, dense, atol=1e-4, rtol=1e-4)


def test_points_inside_of_blocks_and_attached_streams_are_refused(model: Any, tmp_path: Path) -> None:
    with opened(tmp_path, model) as store:
        stream = store.stream("first")
        read(model, stream, TEXT)
        for call in (lambda at: stream.fork("fork", at), stream.rollback):
            with pytest.raises(ConfigError, match="token 17 is inside a block; use 16 or 24"):
                call(17)
        with kvstore.attach(model, stream):
            model(OTHER[:, :3])  # open tokens: in no block yet
            for call in (lambda at: stream.fork("fork", at), stream.rollback):
                with pytest.raises(ConfigError, match="is attached"):
                    call(16)
            with pytest.raises(ConfigError, match="is attached"):
                stream.adopt_prefix(OTHER[0])
        assert keys(store, "first") == [entry.key for entry in store.blocks.manifest("first").entries]
        assert len(keys(store, "first")) == 7, "and they were stored on leaving"


def test_streams_that_begin_alike_share_blocks_unasked(model: Any, tmp_path: Path) -> None:
    with opened(tmp_path, model) as store:
        read(model, store.stream("first"), TEXT)
        before = store.blocks.stats()
        read(model, store.stream("second"), torch.cat([TEXT[:, :24], OTHER], dim=1))
        after = store.blocks.stats()
        assert keys(store, "second")[:3] == keys(store, "first")[:3]
        assert keys(store, "second")[3] != keys(store, "first")[3]
        assert (before.num_blocks, after.num_blocks) == (6, 6 + 3)
        assert store.blocks.verify().is_clean


@pytest.mark.parametrize("reopens", [False, True])
def test_a_stored_prefix_is_taken_over_and_computed_no_more(reopens: bool, model: Any, tmp_path: Path) -> None:
    text = torch.cat([TEXT[:, :30], OTHER], dim=1)
    with opened(tmp_path, model) as store:
        read(model, store.stream("short"), TEXT[:, :16])
        read(model, store.stream("long"), TEXT)
        read(model, store.stream("other"), OTHER)
        read(model, store.stream("narrow", window_tokens=16), text)  # computed in another way
        if not reopens:
            check_adoption(store, model, text)
    if reopens:
        with opened(tmp_path, model) as store:
            check_adoption(store, model, text)


def check_adoption(store: KVStore, model: Any, text: Tensor) -> None:
    """Of the first 30 tokens of `long`, 24 are in whole blocks."""
    stream = store.stream("new")
    num_blocks = store.blocks.stats().num_blocks
    assert stream.adopt_prefix(text[0]) == 24
    assert store.blocks.stats().num_blocks == num_blocks
    assert store.blocks.manifest("new").num_tokens == 24
    had = read(model, stream, text[:, 24:])
    torch.testing.assert_close(had, model(text).logits[:, 24:], atol=1e-4, rtol=1e-4)
    again = store.stream("again")
    read(model, again, text[:, :24])
    torch.testing.assert_close(read(model, again, text[:, 24:]), had, atol=1e-4, rtol=1e-4)
    assert keys(store, "again") == keys(store, "new")
    # A stream goes on likewise from where it stands, and there is nothing else to take.
    more = store.stream("more")
    assert more.adopt_prefix(text[0, :16]) == 16
    assert more.adopt_prefix(text[0, 16:]) == 34
    assert more.adopt_prefix(text[0]) == 0
    assert keys(store, "more") == keys(store, "new")
    assert store.blocks.summaries("more", 2, 5) == store.blocks.summaries("again", 2, 5), "the first that has most"
    assert store.blocks.verify().is_clean
    for name in ("short", "long", "new", "again"):
        store.blocks.remove_stream(name)
    assert [outcome.is_hit for outcome in fetch(store, "more")] == [True] * 7, "each is counted"


def fetch(store: KVStore, name: str) -> list[Outcome]:
    slot = torch.empty(store.blocks.layout.slot_nbytes, dtype=torch.uint8)
    return [store.get([kvstore.BlockKey(key)], [slot])[0] for key in keys(store, name)]


def test_a_last_block_that_is_not_full_is_taken_over_too(model: Any, tmp_path: Path) -> None:
    text = torch.cat([TEXT, OTHER], dim=1)
    with opened(tmp_path, model) as store:
        read(model, store.stream("system"), TEXT)
        stream = store.stream("new")
        assert stream.adopt_prefix(text[0]) == 44
        had = read(model, stream, OTHER)
        torch.testing.assert_close(had, model(text).logits[:, 44:], atol=1e-4, rtol=1e-4)
        assert store.stream("less").adopt_prefix(text[0, :43]) == 40
        assert store.stream("none").adopt_prefix(text[0, 1:]) == 0


@pytest.mark.parametrize(("block", "adopted"), [(0, 0), (1, 40), (3, 24), (4, 32)])
def test_a_damaged_block_that_comes_next_is_computed_again(
    block: int, adopted: int, model: Any, tmp_path: Path
) -> None:
    """Sinks and window are read at once; block 1 is neither, and a miss of questions only."""
    sizes: Any = {"window_tokens": 2 * BLOCK_TOKENS, "sink_tokens": 4}
    with opened(tmp_path, model) as store:
        read(model, store.stream("first", **sizes), TEXT[:, :40])
        damage(store, "first", block)
    with opened(tmp_path, model) as store:
        stream = store.stream("new", **sizes)
        assert stream.adopt_prefix(TEXT[0]) == adopted
        assert store.blocks.manifest("new").num_tokens == adopted
        assert read(model, stream, TEXT[:, adopted:]).isfinite().all()
        assert store.blocks.manifest("new").num_tokens == 44


def test_what_cannot_be_adopted_is_named(model: Any, tmp_path: Path) -> None:
    with opened(tmp_path, model) as store:
        stream = store.stream("first")
        for wrong in (TEXT, TEXT[0].int(), TEXT[0].float()):
            with pytest.raises(ShapeError, match=r"give \[num_tokens\] int64"):
                stream.adopt_prefix(wrong)
        assert stream.adopt_prefix(TEXT[0]) == 0
        assert stream.adopt_prefix(TEXT[0, :0]) == 0
        read(model, stream, TEXT)
    with opened(tmp_path, model, kvstore.Access.READ) as store, pytest.raises(ReadOnlyError):
        store.stream("first").adopt_prefix(OTHER[0])
