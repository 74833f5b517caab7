# SPDX-License-Identifier: Apache-2.0
"""Models whose layers attend or keep a state: streams of them grow, end, go on, fork and are asked, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import kvstore
from kvstore.engines.anatomy import rotation_of, spec_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.past import read_run
from kvstore.errors import CalibrationError, ConfigError, CorruptRecordError
from kvstore.session.state import find_state
from kvstore.session.stream import Stream
from kvstore.store import Access, Store
from kvstore.video.ingest import ingest
from kvstore.video.settings import IngestConfig
from tests.test_transformers_generate import generate
from tests.tiny_models import BLOCK_TOKENS, SIZES, build, make_model, token_ids

LFM2 = {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]}
QWEN3_NEXT = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "mlp_only_layers": [0, 1, 2],
}


def make_hybrid(family: str) -> PreTrainedModel:
    """A random hybrid model, the same every time: short convolutions, or a gated delta rule."""
    if family == "lfm2":
        return build(Lfm2ForCausalLM, Lfm2Config(**{**SIZES, **LFM2}))
    return build(Qwen3NextForCausalLM, Qwen3NextConfig(**{**SIZES, **QWEN3_NEXT}))


@contextmanager
def opened(path: Path, model: PreTrainedModel, name: str = "s", **settings: Any) -> Iterator[Stream]:
    """A stream of a store that is opened for it alone."""
    settings = {"window_tokens": 100_000, **settings}
    with torch.no_grad(), kvstore.open(path, spec_of(model), block_tokens=BLOCK_TOKENS) as store:
        yield store.stream(name, **settings)


def uninterrupted(model: PreTrainedModel, ids: Tensor, chunks: Sequence[int]) -> list[Tensor]:
    """Logits of every chunk, from the engine's own cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        return [model(part, past_key_values=cache).logits for part in ids.split(list(chunks), dim=1)]


def grow(path: Path, model: PreTrainedModel, ids: Tensor, chunks: Sequence[int], name: str = "s") -> list[Tensor]:
    """The same from a stream, which is attached for them and stored."""
    with opened(path, model, name) as stream, kvstore.attach(model, stream):
        return [model(part).logits for part in ids.split(list(chunks), dim=1)]


def num_saved(stream: Stream) -> int | None:
    """Tokens that the newest state stands for."""
    found = stream.state()
    return None if found is None else found.num_tokens


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
def test_a_stream_goes_on_where_another_process_left_it(tmp_path: Path, family: str) -> None:
    ids, chunks = token_ids(50), [16, 7, 1, 1, 5, 20]
    wanted = uninterrupted(make_hybrid(family), ids, chunks)
    first = grow(tmp_path, make_hybrid(family), ids[:, :24], chunks[:3])
    second = grow(tmp_path, make_hybrid(family), ids[:, 24:], chunks[3:])
    assert same([*first, *second], wanted)
    with Store.open(tmp_path, access=Access.READ) as store:
        assert store.verify().is_clean
        assert store.stats().num_objects == 2


def test_a_rollback_and_a_fork_go_on_from_the_state_at_their_ends(tmp_path: Path) -> None:
    model, ids = make_hybrid("qwen3-next"), token_ids(40)
    other = torch.cat([ids[:, :16], token_ids(8, seed=5)], dim=1)
    grow(tmp_path, model, ids[:, :16], [16])
    grow(tmp_path, model, ids[:, 16:], [24])
    with opened(tmp_path, model) as stream:
        assert num_saved(stream) == 40
        fork = stream.fork("fork", 16)
        assert num_saved(fork) == 16
        stream.rollback(24)
        assert num_saved(stream) == 16
        with pytest.raises(ConfigError, match=r"24 tokens, and the state .* last saved at 16: roll it back to there"):
            kvstore.attach(model, stream).__enter__()
        stream.rollback(16)
        with kvstore.attach(model, stream):
            assert same([model(ids[:, 16:24]).logits], uninterrupted(model, ids[:, :24], [16, 8])[1:])
    assert same(grow(tmp_path, model, other[:, 16:], [8], "fork"), uninterrupted(model, other, [16, 8])[1:])
    with opened(tmp_path, model) as stream:
        stream.rollback(8)
        assert stream.state() is None
        with pytest.raises(ConfigError, match="was never saved"):
            kvstore.attach(model, stream).__enter__()


def test_an_adopted_prefix_brings_the_state_at_its_end(tmp_path: Path) -> None:
    model, ids = make_hybrid("lfm2"), token_ids(40)
    grow(tmp_path, model, ids[:, :16], [16])
    grow(tmp_path, model, ids[:, 16:32], [16])
    wanted = uninterrupted(model, ids, [16, 16, 8])
    with opened(tmp_path, model, "other") as stream:
        assert stream.adopt_prefix(ids[0]) == 32
        with kvstore.attach(model, stream):
            assert torch.equal(model(ids[:, 32:]).logits, wanted[2])
    with opened(tmp_path, model, "third") as stream:
        assert stream.adopt_prefix(ids[0, :24]) == 16, "no state was saved at 24"
        with kvstore.attach(model, stream):
            assert torch.equal(model(ids[:, 16:32]).logits, wanted[1])
        assert num_saved(stream) == 32
    with Store.open(tmp_path, access=Access.READ) as store:
        assert store.verify().is_clean


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
@pytest.mark.parametrize("policy", ["maxsim", "quest"])
def test_questions_leave_the_states_as_they_are(tmp_path: Path, family: str, policy: str) -> None:
    model, ids, question = make_hybrid(family), token_ids(48), token_ids(6, seed=3)
    with opened(tmp_path, model, policy=policy, budget_tokens=16) as stream, kvstore.attach(model, stream) as attached:
        logits = [model(ids[:, :32]).logits]
        assert torch.equal(generate(model, question), generate(model, question))
        assert generate(model, question, past_key_values=attached.question(question)).shape[1] > 0
        reply = attached.reply(question, max_new_tokens=3, do_sample=False)
        logits.append(model(ids[:, 32:]).logits)
    whole = torch.cat([ids[:, :32], question, reply, ids[:, 32:]], dim=1)
    wanted = uninterrupted(model, whole, [32, 5, 1 + reply.shape[1], 16])
    assert same(logits, [wanted[0], wanted[3]])


@pytest.mark.parametrize(("policy", "budget"), [("maxsim", 8), ("quest", 1000)])
def test_a_question_goes_on_from_the_streams_state(tmp_path: Path, policy: str, budget: int) -> None:
    """A pass ahead, which chooses blocks, does not count twice; where all is attended, the logits are the engine's."""
    model, ids = make_hybrid("qwen3-next"), token_ids(30)
    engine = DynamicCache(config=model.config)
    with (
        opened(tmp_path, model, policy=policy, budget_tokens=budget, sink_tokens=8) as stream,
        kvstore.attach(model, stream) as attached,
    ):
        model(ids[:, :24])
        _, wanted = (model(part, past_key_values=engine).logits for part in ids.split([24, 6], dim=1))
        for cache in (attached.question(), attached.question(ids[:, 24:])):
            logits = model(ids[:, 24:], past_key_values=cache).logits
            first: tuple[Any, ...] = (cache.layers[0], engine.layers[0])  # no layer that attends comes before
            assert torch.equal(*(each.recurrent_states[0] for each in first))
            assert policy == "maxsim" or torch.allclose(logits, wanted, atol=1e-4)


def test_gradients_and_inference_mode_do_not_cling_to_the_states(tmp_path: Path) -> None:
    model, ids = make_hybrid("qwen3-next"), token_ids(24)
    wanted = uninterrupted(model, ids, [8, 8, 8])
    with kvstore.open(tmp_path, spec_of(model), block_tokens=BLOCK_TOKENS) as store:
        stream = store.stream("s", window_tokens=100_000)
        with kvstore.attach(model, stream):
            logits = [model(ids[:, :8]).logits.detach()]
            with torch.inference_mode():
                logits.append(model(ids[:, 8:16]).logits)
            logits.append(model(ids[:, 16:]).logits.detach())
    assert same(logits, wanted)


def test_a_forward_that_fails_midway_leaves_states_that_nobody_goes_on_from(tmp_path: Path) -> None:
    model, ids = make_hybrid("lfm2"), token_ids(24)
    with opened(tmp_path, model) as stream:
        attached = kvstore.attach(model, stream)
        attached.__enter__()
        model(ids[:, :8])
        handle = model.model.layers[2].register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 8:16])
        handle.remove()
        with pytest.raises(ConfigError, match="failed midway"):
            model(ids[:, 8:16])
        with pytest.raises(ConfigError, match="failed midway"):
            attached.__exit__(None, None, None)
        assert stream.state() is None


def test_what_a_state_cannot_do_is_refused(tmp_path: Path) -> None:
    model, ids = make_hybrid("lfm2"), token_ids(16)
    with opened(tmp_path, model) as stream, kvstore.attach(model, stream) as attached:
        model(ids)
        with pytest.raises(ConfigError, match="cannot take tokens back"):
            attached.cache().crop(-1)
        with pytest.raises(ConfigError, match="one at a time"):
            model(ids.expand(2, -1))
        with pytest.raises(ConfigError, match="without beams"):
            attached.question().reorder_cache(torch.tensor([0, 0]))
    with (
        kvstore.open(tmp_path, spec_of(model), block_tokens=BLOCK_TOKENS) as store,
        pytest.raises(ConfigError, match="cannot be joined"),
    ):
        kvstore.attach(model, store.contexts(["s"])).__enter__()
    with pytest.raises(CalibrationError, match="linear layers"):
        read_run(model, ids, ids)


WRONG = [
    [b"{"],
    [b"[]"],
    [b'{"version":2,"states":[]}'],
    [b'{"version":1,"states":[]}'],
    [
        b'{"version":1,"states":[{"layer":1,"number":0,"field":"conv_states","dtype":"torch.float32","shape":[1]}]}',
        b"1234",
    ],
    [b'{"version":1,"states":[{"layer":0,"number":0,"field":"pop","dtype":"torch.float32","shape":[1]}]}', b"1234"],
    [b'{"version":1,"states":[{"layer":0,"number":0,"field":"conv_states","dtype":"os","shape":[1]}]}', b"1234"],
    [
        b'{"version":1,"states":[{"layer":0,"number":0,"field":"conv_states","dtype":"torch.float32","shape":[9]}]}',
        b"1",
    ],
    [
        b'{"version":1,"states":[{"layer":0,"number":0,"field":"conv_states","dtype":"torch.float32","shape":[1]}]}',
        b"1234",
    ],
    [b'{"version":1,"states":[{"layer":0,"number":0,"field":"","dtype":"torch.float32","shape":[1e999]}]}', b"1234"],
    [b"[" * 100_000],
]


@pytest.mark.parametrize("parts", WRONG, ids=range(len(WRONG)))
def test_a_state_of_another_model_is_refused(tmp_path: Path, parts: list[bytes]) -> None:
    model = make_hybrid("lfm2")
    grow(tmp_path, model, token_ids(8), [8])
    with opened(tmp_path, model) as stream:
        stream.bind(rotation_of(model), model.device)
        stream.save_state(parts)
        with pytest.raises(CorruptRecordError, match="is not one of this model"):
            kvstore.attach(model, stream).__enter__()


def test_states_of_any_model_are_saved_and_found(tmp_path: Path) -> None:
    model, ids = make_model(), token_ids(40)
    with opened(tmp_path, model) as stream:
        with pytest.raises(ConfigError, match="not bound"):
            stream.save_state([b"too early"])
        assert stream.bind(rotation_of(model), model.device).num_tokens == 0
        assert stream.state() is None
        for number in range(1, 4):
            with kvstore.attach(model, stream):
                model(ids[:, : 8 * number - 3])  # ends inside a block
            stream.save_state([b"replaced"])
            stream.save_state([b"state %d" % number, memoryview(bytes(number))])
        found = stream.state()
        assert found is not None
        assert (found.num_tokens, found.parts) == (5 + 13 + 21, [b"state 3", bytes(3)])
        stream.rollback(18)
        assert stream.state() == kvstore.SavedState(18, [b"state 2", bytes(2)])
        fork = stream.fork("other", 5)
        assert fork.state() == kvstore.SavedState(5, [b"state 1", bytes(1)])
    with Store.open(tmp_path, access=Access.READ) as store:
        assert store.verify().is_clean


def test_a_state_behind_other_tokens_is_none_of_those_that_were_known(tmp_path: Path) -> None:
    model = make_hybrid("lfm2")
    grow(tmp_path, model, token_ids(16), [16])
    with opened(tmp_path, model) as stream:
        known = stream._store.manifest("s").entries
        stream.rollback(0)
    grow(tmp_path, model, token_ids(16, seed=5), [16])
    with opened(tmp_path, model) as stream:
        assert num_saved(stream) == 16
        assert find_state(stream._store, "s", known) is None


def test_an_ingest_refuses_a_model_whose_states_it_does_not_save(tmp_path: Path) -> None:
    reader = LanguageModel(make_hybrid("lfm2"), tokenizer=None, path=tmp_path)
    with pytest.raises(ConfigError, match="linear layers"):
        ingest(tmp_path / "video.mp4", tmp_path / "store", "s", reader, IngestConfig(), lambda progress: None)
    assert not (tmp_path / "store").exists()
