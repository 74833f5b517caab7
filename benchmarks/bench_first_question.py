# SPDX-License-Identifier: Apache-2.0
"""What a process must bring before it can choose for its first question: what is kept of a stream, or all its keys."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness import Report, alternate, check, cpu, options, wall
from kvstore.config import Access, Durability
from kvstore.engines.anatomy import decoder_of, position_rows, rotation_of, spec_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.transformers import attach
from kvstore.layout import BlockLayout
from kvstore.retrieval.registry import policies, policy_named
from kvstore.retrieval.tokens import LayerQuery
from kvstore.session.session import Session
from kvstore.session.stream_memory import StreamMemory
from kvstore.session.view import SessionConfig, StreamView
from kvstore.store import Profile, Store, StreamHeader
from kvstore.video.model import load
from real_kv import BLOCK_TOKENS, CHUNK_TOKENS, add_options, text_ids

NAME = "bench"
POLICIES = ("quest", "auto")
TOKENS, QUICK_TOKENS = 8_192, 4_096
WINDOW_TOKENS = 512
HOST_BLOCKS = 16
"""Of the host tier: fewer than the stream has, so that blocks come from disk."""


class Forgetful:
    """A store that has kept nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def objects(self, name: str, kind: str) -> list[object]:
        """None."""
        return []


def more_options(parser: argparse.ArgumentParser) -> None:
    """Let the caller choose stream and policies."""
    add_options(parser)
    views = sorted(name for name, each in policies().items() if each.views)
    parser.add_argument("--policies", nargs="+", choices=views, default=POLICIES, help="what is asked by")
    parser.add_argument("--tokens", type=int, help=f"of the stream; default: {TOKENS}, all of a store of yours")


def write_stream(folder: Path, model: LanguageModel, num_tokens: int) -> None:
    """Have a model read a text, of which nothing is kept but the blocks."""
    layout, config = layout_of(model), SessionConfig(policy_named("streaming_llm"), WINDOW_TOKENS)
    with Store.open(
        folder, access=Access.WRITE, layout=layout, host_nbytes=64 << 20, durability=Durability.NONE
    ) as store:
        header = StreamHeader(NAME, layout.spec, BLOCK_TOKENS, Profile.LOSSLESS, config.prefill, {}, 0.0)
        manifest, rows = store.create_stream(header), position_rows(model.model)
        session = Session(store, manifest.header, config, rotation_of(model.model), model.device, rows)
        ids = text_ids(model, num_tokens)
        with attach(model.model, session) as attached, torch.inference_mode():
            for first in range(0, num_tokens, CHUNK_TOKENS):
                chunk = torch.tensor([ids[first : first + CHUNK_TOKENS]], device=model.device)
                decoder_of(model.model)(input_ids=chunk, past_key_values=attached.cache(), use_cache=True)
        session.commit(partial=True)
        session.flush()


def layout_of(model: LanguageModel) -> BlockLayout:
    """Of scratch streams."""
    return BlockLayout(spec_of(model.model), BLOCK_TOKENS)


class Streams:
    """One stream in a scratch store, opened again and again as a new process would.

    Args:
        folder: of the store.
        model: that wrote it.
        num_tokens: at most so many count; None for all.
    """

    def __init__(self, folder: Path, model: LanguageModel, num_tokens: int | None) -> None:
        self.folder, self.model, self.num_tokens = folder, model, num_tokens
        with Store.open(folder, access=Access.READ) as store:
            self.header = store.streams()[0]
        self.layout = BlockLayout(self.header.spec, self.header.block_tokens)

    def open(self, access: Access) -> Store:
        """Open the store."""
        host_nbytes = HOST_BLOCKS * self.layout.slot_nbytes
        return Store.open(self.folder, access=access, layout=self.layout, host_nbytes=host_nbytes)

    def view(self, store: Store, policy: str) -> StreamView:
        """What a process that asks knows of the stream."""
        rule = dataclasses.replace(policy_named(policy), beyond=None)
        config = SessionConfig(rule, WINDOW_TOKENS, device_nbytes=1)
        model = self.model.model
        view = StreamView(store, self.header, config, rotation_of(model), torch.device("cpu"), position_rows(model))
        if self.num_tokens is not None:
            view.entries = view.entries[: int(torch.searchsorted(view.entries.first_tokens, self.num_tokens))]
        return view


def brought(view: StreamView) -> StreamMemory:
    """What a first question searches by."""
    memory = view.new_memory(view.config.policy)
    memory.refresh(view.num_sink_blocks, view.entries)
    memory.show_pending()
    return memory


def bench(report: Report, streams: Streams, policy: str) -> None:
    """Keep what is searched by; bring it from there and from the keys in turns."""
    with streams.open(Access.WRITE) as store:
        view = streams.view(store, policy)
        brought(view).keep(view.num_sink_blocks, view.entries)
        store.flush()
    with streams.open(Access.READ) as store:
        kept, bare = streams.view(store, policy), streams.view(store, policy)
        bare.store = Forgetful(store)  # type: ignore[assignment]
        spec, count = streams.header.spec, kept.entries.end_token
        asking = torch.randn(spec.kv_heads, 1, 1, spec.key_dim, generator=torch.Generator().manual_seed(0))
        query = LayerQuery(asking, torch.full((kept.rows, 1), count), kept.rotate, WINDOW_TOKENS)
        memories = brought(kept), brought(bare)
        for layer in range(spec.num_layers):
            found, wanted = (each.select(layer, query, 512, count).scores for each in memories)
            check(torch.equal(found, wanted), f"layer {layer}: what was kept scores otherwise than keys")
        case = {"policy": policy, "tokens": count, "model": streams.model.path.stem}
        calls = {"kept": lambda: brought(kept), "keys": lambda: brought(bare)}
        for name, clock in (("wall", wall), ("cpu", cpu)):
            timings = alternate(calls, clock=clock)
            for what, timing in timings.items():
                report.latency("bring", (what, timing), ("keys", timings["keys"]), clock=name, **case)


def main() -> None:
    """Measure by each policy in turn."""
    settings = options("first-question", __doc__, more_options)
    report = Report(settings)
    model = load(settings.model)
    with TemporaryDirectory(dir=settings.folder) as scratch:
        folder = Path(scratch) / "store"
        if settings.store is not None:
            shutil.copytree(settings.store, folder)
        else:
            write_stream(folder, model, settings.tokens or (QUICK_TOKENS if settings.quick else TOKENS))
        streams = Streams(folder, model, settings.tokens)
        for policy in settings.policies:
            bench(report, streams, policy)
    report.write()


if __name__ == "__main__":
    main()
