# SPDX-License-Identifier: Apache-2.0
"""Tiny random language models and streams over them: what the tests of retrieval, session and adapter run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvstore.engines.anatomy import position_rows, rotation_of, spec_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.transformers import Attached, attach
from kvstore.layout import BlockLayout
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.store import Access, Durability, Profile, Store, StreamHeader

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
BLOCK_TOKENS = 8
ALL = 100_000
"""More tokens than any stream of these tests holds."""


def make_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of a family, the same every time."""
    config_class, model_class, extra = FAMILIES[family]
    return build(model_class, config_class(**{**SIZES, **extra, **changes}), dtype)


def build(model_class: Any, config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a config, the same every time, whose generations end by length only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config)
    torch.nn.Module.to(model, dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.eval()
    return model


def token_ids(count: int, seed: int = 1) -> Tensor:
    """Random ids `[1, count]`, never the padding id."""
    return torch.randint(1, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def policy(name: str = "maxsim", **changes: Any) -> Policy:
    """A named policy with some parts replaced; pages as small as the blocks."""
    named = policy_named(name)
    if named.segmenter is not None:
        changes = {"segmenter": Pages(BLOCK_TOKENS), **changes}
    return replace(named, **changes)


ORIGINAL = policy(position=PositionPolicy.ORIGINAL)
"""Attends to everything where it was seen, if the budget allows."""


def settings(rule: Policy, window: int = ALL, sinks: int = BLOCK_TOKENS, budget: int = ALL) -> SessionConfig:
    """A config with a small device pool."""
    return SessionConfig(rule, window_tokens=window, sink_tokens=sinks, budget_tokens=budget, device_nbytes=4 << 20)


@contextmanager
def open_session(
    path: Path,
    model: PreTrainedModel,
    config: SessionConfig,
    access: Access = Access.WRITE,
    profile: Profile = Profile.LOSSLESS,
) -> Iterator[Session]:
    """Open the stream `s` of a store and close it again."""
    spec = spec_of(model)
    with Store.open(
        path,
        access=access,
        layout=BlockLayout(spec, BLOCK_TOKENS),
        profile=profile,
        host_nbytes=4 << 20,
        durability=Durability.NONE,
        io_threads=1,
        decode_threads=1,
    ) as store:
        if access is Access.WRITE:
            store.create_stream(StreamHeader("s", spec, BLOCK_TOKENS, profile, config.prefill, {}, time.time()))
        header = store.manifest("s").header
        yield Session(store, header, config, rotation_of(model), torch.device("cpu"), position_rows(model))


@contextmanager
def attached_stream(
    path: Path,
    model: PreTrainedModel,
    config: SessionConfig,
    access: Access = Access.WRITE,
    profile: Profile = Profile.LOSSLESS,
) -> Iterator[Attached]:
    """Open a stream and attach it, without gradients."""
    with (
        torch.no_grad(),
        open_session(path, model, config, access, profile) as session,
        attach(model, session) as attached,
    ):
        yield attached


def feed(model: PreTrainedModel, ids: Tensor, chunks: Sequence[int], **kwargs: Any) -> list[Tensor]:
    """Run ids through a model in chunks: the logits of each."""
    return [model(part, **kwargs).logits for part in ids.split(list(chunks), dim=1)]


class _Tokenizer:
    """Every sign is its code point."""

    eos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool) -> object:
        return type("Ids", (), {"input_ids": [ord(sign) for sign in text]})


def language_model_of(family: str = "llama") -> LanguageModel:
    """A tiny random model, with signs for tokens."""
    return LanguageModel(make_model(family), _Tokenizer(), Path("tiny"))
