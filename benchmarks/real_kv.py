# SPDX-License-Identifier: Apache-2.0
"""Real keys and values to measure with: blocks of a given store, or of a small model that reads Python sources."""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from harness import check
from kvstore.codec import Profile
from kvstore.engines.anatomy import decoder_of, position_rows, rotation_of, spec_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.transformers import attach
from kvstore.layout import BlockLayout
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.registry import policy_named
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.store import Access, Durability, FetchRequest, Outcome, Store, StreamHeader
from kvstore.video.model import load

BLOCK_TOKENS = 128
CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Corpus:
    """Blocks of one stream.

    Args:
        layout: of the slots.
        slots: [slot_nbytes] uint8 each.
        num_tokens: tokens in each slot.
        origin: where they come from, for the report.
    """

    layout: BlockLayout
    slots: list[Tensor]
    num_tokens: list[int]
    origin: str

    @property
    def first_tokens(self) -> list[int]:
        """Position of each block in the stream."""
        return [sum(self.num_tokens[:block]) for block in range(len(self.num_tokens))]

    @property
    def raw_nbytes(self) -> int:
        """Uncompressed KV bytes of all blocks."""
        return sum(self.num_tokens) * self.layout.spec.token_nbytes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let the caller choose a store or a model."""
    parser.add_argument("--store", type=Path, help="take the blocks of the first stream of this store")
    parser.add_argument("--model", type=Path, help="model folder or GGUF file; the default is SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, help="where scratch stores are written; default: the system's")


def text_ids(model: LanguageModel, num_tokens: int) -> list[int]:
    """Token ids of Python's own sources: the same on every machine with this Python."""
    text = "".join(inspect.getsource(module) for module in (argparse, subprocess, inspect, json))
    ids = model.encode(text)
    check(len(ids) >= num_tokens, f"the text has {len(ids)} tokens, {num_tokens} wanted")
    return ids[:num_tokens]


@contextmanager
def scratch_session(
    language_model: LanguageModel, folder: Path | None, policy: Policy, window_tokens: int
) -> Iterator[Session]:
    """An empty stream in a scratch store, attended over `window_tokens`, without sinks."""
    model = language_model.model
    spec = spec_of(model)
    config = SessionConfig(policy=policy, window_tokens=window_tokens, sink_tokens=0)
    with (
        TemporaryDirectory(dir=folder) as scratch,
        Store.open(
            Path(scratch) / "store",
            access=Access.WRITE,
            layout=BlockLayout(spec, BLOCK_TOKENS),
            host_nbytes=256 << 20,
            durability=Durability.COMMIT,
        ) as store,
    ):
        header = StreamHeader("bench", spec, BLOCK_TOKENS, Profile.LOSSLESS, config.prefill, {}, 0.0)
        manifest = store.create_stream(header)
        rotate, rows = rotation_of(model), position_rows(model)
        yield Session(store, manifest.header, config, rotate, language_model.device, rows)


def corpus(options: argparse.Namespace, num_blocks: int) -> Corpus:
    """`num_blocks` real blocks; fewer when the given store has fewer."""
    if options.store is not None:
        with Store.open(options.store, access=Access.READ) as listing:
            header = listing.streams()[0]
        layout = BlockLayout(header.spec, header.block_tokens)
        with Store.open(options.store, access=Access.READ, layout=layout) as store:
            return _collect(store, header.name, layout, num_blocks, "a given store")
    language_model = load(options.model)
    ids = text_ids(language_model, num_blocks * BLOCK_TOKENS)
    decoder = decoder_of(language_model.model)
    with scratch_session(language_model, options.folder, policy_named("auto"), 512) as session:
        with attach(language_model.model, session) as attached, torch.inference_mode():
            for first in range(0, len(ids), CHUNK_TOKENS):
                chunk = torch.tensor([ids[first : first + CHUNK_TOKENS]], device=language_model.device)
                decoder(input_ids=chunk, past_key_values=attached.cache(), use_cache=True)
        session.commit()
        view = session.view
        view.store.flush()
        return _collect(
            view.store, "bench", view.layout, num_blocks, f"{language_model.path.stem} over Python's sources"
        )


def _collect(store: Store, name: str, layout: BlockLayout, num_blocks: int, origin: str) -> Corpus:
    entries = store.manifest(name).entries[:num_blocks]
    slots = [torch.zeros(layout.slot_nbytes, dtype=torch.uint8) for _ in entries]
    report = store.fetch([FetchRequest(entry.key, slot) for entry, slot in zip(entries, slots, strict=True)])
    check(
        all(outcome in (Outcome.HOST, Outcome.DISK) for outcome in report.outcomes), "blocks of the corpus are missing"
    )
    return Corpus(layout, slots, [entry.num_tokens for entry in entries], origin)
