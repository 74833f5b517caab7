# SPDX-License-Identifier: Apache-2.0
"""The public face without an engine: an attention layer of one's own over a stream."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvstore
from kvstore.errors import CapacityError, ConfigError, ShapeError, StoreIOError
from kvstore.face import KVStore
from kvstore.retrieval.summary import received_of
from kvstore.session.stream import Stream
from kvstore.tiers.disk import DiskTier

SPEC = kvstore.ModelSpec(2, 1, 16, 16, "float32", "pre", "mine", "{}", "weights-1")
BLOCK = 8
CPU = torch.device("cpu")


def still(vectors: Tensor, positions: Tensor) -> Tensor:
    """A rotary function that leaves everything where it is."""
    return vectors


def open_folder(path: Path) -> KVStore:
    """A store for blocks of `SPEC`."""
    return kvstore.open(path, SPEC, block_tokens=BLOCK, host_nbytes=1 << 20, durability=kvstore.Durability.NONE)


def tensors(num_new: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys, values of a forward."""
    generator = torch.Generator().manual_seed(num_new)
    query, keys, values = (torch.randn(1, count, num_new, 16, generator=generator) for count in (heads, 1, 1))
    return query, keys, values


def forward(stream: Stream, first: int, num_new: int) -> Tensor:
    """One forward of both layers, of tokens `first` to `first + num_new`."""
    out = torch.empty(0)
    for layer in range(2):
        at = torch.arange(first, first + num_new).view(1, 1, -1)
        out = stream.attend(layer, *tensors(num_new), at, ids=at[0, 0], scale=0.25)
    return out


def test_stored_summaries_hold_the_keys_that_were_attended_to(tmp_path: Path) -> None:
    """InfLLM's: the mean of the four keys of a block that got most attention, by the layer that attended."""
    looked_at = {0: [0, 1, 4, 6], 1: [0, 1, 3, 5]}  # the first tokens are looked at by all that follow anyway
    keys = torch.eye(16)[None, None, :BLOCK]
    with open_folder(tmp_path) as store:
        stream = store.stream("s", policy="infllm")
        stream.bind(still, CPU)
        # The tokens of a second forward look back at the first block's, each at one of them.
        for first, num_new in ((0, BLOCK - 1), (BLOCK - 1, 4)):
            at = torch.arange(first, first + num_new).view(1, 1, -1)
            for layer, wanted in looked_at.items():
                query = 40 * torch.eye(16)[wanted] if first else torch.zeros(num_new, 16)
                new = keys[:, :, :num_new] if first == 0 else torch.full((1, 1, num_new, 16), -1.0)
                stream.attend(layer, query[None, None], new, new, at, ids=at[0, 0], scale=1.0)
        stream.commit()
        stored = received_of(store.blocks.summaries("s", 0, 1)[0], (2, 1, BLOCK))
    for layer, wanted in looked_at.items():
        most = stored[layer, 0].topk(len(wanted)).indices
        assert sorted(most.tolist()) == sorted(wanted)


def test_a_question_attends_to_what_was_appended(tmp_path: Path) -> None:
    with open_folder(tmp_path) as store:
        stream = store.stream("s", device_nbytes=1 << 20)
        with pytest.raises(ConfigError, match="not bound"), stream.recalling():
            pass
        stream.bind(still, CPU)
        for first in range(0, 64, 16):
            forward(stream, first, 16)
        stream.commit()
        with stream.recalling():
            forward(stream, 0, 3)
        with stream.asking():
            assert forward(stream, 0, 5).shape == (1, 2, 5, 16)
        assert stream.last.num_attended_tokens == 64
        forward(stream, 64, 1)


@pytest.mark.parametrize("policy", ["maxsim", "rekv", "infllm", "streaming_llm"])
def test_a_question_that_did_not_run_is_refused(policy: str, tmp_path: Path) -> None:
    with open_folder(tmp_path) as store:
        stream = store.stream("s", policy=policy)
        stream.bind(still, CPU)
        forward(stream, 0, 32)
        with pytest.raises(ConfigError, match="no question ran"), stream.recalling():
            pass
        with pytest.raises(ConfigError, match="no question ran"), stream.recalling():
            stream.attend(0, *tensors(3), torch.arange(3).view(1, 1, -1), ids=torch.arange(3), scale=1.0)
        with pytest.raises(ConfigError, match="nothing was recalled"), stream.asking():
            pass
        with stream.recalling():
            forward(stream, 0, 3)
        with stream.asking():
            assert forward(stream, 0, 3).isfinite().all()


def test_forwards_may_run_in_any_autograd_mode_and_leave_no_graph(tmp_path: Path) -> None:
    with open_folder(tmp_path) as store:
        with torch.inference_mode():
            stream = store.stream("s")
            stream.bind(still, CPU)
            forward(stream, 0, 5)
        at = torch.arange(5, 8).view(1, 1, -1)
        for layer in range(2):
            query, keys, values = (each.requires_grad_() for each in tensors(3))
            assert not stream.attend(layer, query, keys, values, at, ids=at[0, 0], scale=1.0).requires_grad
        with torch.inference_mode():
            forward(stream, 8, 4)
        stream.commit()


def test_layers_out_of_turn_and_tensors_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    query, keys, values = tensors(3)
    at = torch.arange(4, 7).view(1, 1, -1)
    with open_folder(tmp_path) as store:
        stream = store.stream("s")
        session = stream.bind(still, CPU)
        forward(stream, 0, 4)
        with pytest.raises(ShapeError, match="no tokens"):
            forward(stream, 4, 0)
        with pytest.raises(ShapeError, match="layer 1 out of turn"):
            stream.attend(1, query, keys, values, at, ids=at[0, 0], scale=1.0)
        with pytest.raises(ShapeError, match="layer 2 out of turn"):
            stream.attend(2, query, keys, values, at, ids=at[0, 0], scale=1.0)
        for wrong in (
            (query[..., :8], keys, values, at),
            (query, keys.expand(-1, 2, -1, -1), values, at),
            (query, keys[..., :1], values, at),
            (query, keys, values[:, :, :1], at),
            (query, keys, values, at[..., :1]),
            (query, keys, values, at.expand(3, -1, -1)),
        ):
            with pytest.raises(ShapeError, match="the model's are"):
                stream.attend(0, *wrong, ids=at[0, 0], scale=1.0)
        with pytest.raises(ShapeError, match="3 tokens have as many"):
            stream.attend(0, query, keys, values, at, ids=at[0, 0, :2], scale=1.0)
        with pytest.raises(ShapeError, match="goes on at position 4"):
            stream.attend(0, query, keys, values, at + 1, ids=at[0, 0], scale=1.0)
        assert session.num_tokens == 4
        stream.attend(0, query, keys, values, at, ids=at[0, 0], scale=1.0)
        stream.commit()
        assert [entry.num_tokens for entry in session.view.entries] == [4], "the unfinished forward is not stored"


def test_a_stream_whose_append_failed_says_to_open_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CapacityError("the file system is full")

    with open_folder(tmp_path) as store:
        stream = store.stream("s")
        stream.bind(still, CPU)
        forward(stream, 0, 16)
        stream.commit()
        with monkeypatch.context() as full:
            full.setattr(DiskTier, "allocate", refuse)
            forward(stream, 16, 16)
            with pytest.raises(CapacityError, match="file system is full"):
                stream.commit()
        with pytest.raises(StoreIOError, match="open the stream again"):
            forward(stream, 32, 16)
        again = store.stream("s")
        assert again.bind(still, CPU).num_tokens == 16
        forward(again, 16, 16)
        again.commit()
        assert store.blocks.verify().is_clean


def test_a_failure_that_another_stream_was_told_of_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CapacityError("the file system is full")

    with open_folder(tmp_path) as store:
        one, other = store.stream("one"), store.stream("other")
        for stream in (one, other):
            stream.bind(still, CPU)
        with monkeypatch.context() as full:
            full.setattr(DiskTier, "allocate", refuse)
            forward(one, 0, 2 * BLOCK)
            one.bind(still, CPU).commit()
            with pytest.raises(CapacityError, match="file system is full"):
                other.commit()
        with pytest.raises(StoreIOError, match="open the stream again"):
            one.commit()


def test_the_next_best_blocks_wait_in_memory_and_change_no_answer(tmp_path: Path) -> None:
    with open_folder(tmp_path) as store:
        stream = store.stream("s", window_tokens=16)
        stream.bind(still, CPU)
        for first in range(0, 96, 16):
            forward(stream, first, 16)
        stream.commit()
    answers, brought = [], []
    for prefetch_tokens in (0, 24):
        with open_folder(tmp_path) as store:
            stream = store.stream("s", window_tokens=16, budget_tokens=16, prefetch_tokens=prefetch_tokens)
            stream.bind(still, CPU)
            with stream.recalling():
                forward(stream, 0, 3)
            until_s = time.monotonic() + 60
            while prefetch_tokens and not store.blocks.stats().host.prefetched_blocks:
                assert time.monotonic() < until_s
                time.sleep(0.01)
            brought.append(store.blocks.stats().host.prefetched_blocks)
            with stream.asking():
                answers.append(forward(stream, 0, 3))
    assert brought[0] == 0 < brought[1]
    assert torch.equal(*answers)


def test_budgets_that_are_too_small_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"host_nbytes is 1; .* raise it"):
        kvstore.open(tmp_path, SPEC, block_tokens=BLOCK, host_nbytes=1)
    with open_folder(tmp_path) as store:
        stream = store.stream("s", device_nbytes=0)
        stream.bind(still, CPU)
        with pytest.raises(CapacityError, match="raise device_nbytes"):
            forward(stream, 0, 1000)
