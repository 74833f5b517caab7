# SPDX-License-Identifier: Apache-2.0
"""Two processes ask a stream while a third writes it: each answer is that of the stream as it was at that moment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

for _module in ("av", "PIL", "tesserocr", "transformers"):
    pytest.importorskip(_module)

from kvstore.store import Access, NewBlock, Store  # noqa: E402
from tests.cli_runs import Nursery, open_nursery, record_silently, save_tiny_model  # noqa: E402

QUESTIONS = ("What is the colour of the garden gate?", "How are modules imported?")
MAX_ROUNDS = 2


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with open_nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        nursery.run("--help")  # it is ready when this returns
        yield nursery


def answers(nursery: Nursery, store: Path, model: Path) -> list[dict[str, Any]]:
    """Ask both questions at once, in two processes."""
    runs = [
        nursery.start("ask", question, "--store", store, "--stream", "s", "--model", model, "--json")
        for question in QUESTIONS
    ]
    found = []
    for run in runs:
        done = run.wait()
        assert done.code == 0, done.err
        assert done.err == "" or done.err.startswith("kvstore: note: the stream is not complete"), done.err
        found.append(
            {k: v for k, v in json.loads(done.out).items() if k not in ("ttft_s", "stages_s", "index_s", "bytes_read")}
        )
    return found


def copy_beginning(source: Path, target: Path, num_tokens: int) -> None:
    """Write the blocks that hold the first `num_tokens` tokens of stream `s` into a store of their own."""
    with Store.open(source, access=Access.READ) as listing:
        header = listing.manifest("s").header
    layout = header.layout
    with (
        Store.open(source, access=Access.READ, layout=layout, host_nbytes=1 << 20) as reader,
        Store.open(target, access=Access.WRITE, layout=layout, host_nbytes=1 << 20) as writer,
    ):
        manifest = reader.manifest("s")
        ends = list(accumulate(entry.num_tokens for entry in manifest.entries))
        assert num_tokens in ends, "a question sees whole blocks"
        entries = manifest.entries[: ends.index(num_tokens) + 1]
        slots = [torch.zeros(layout.slot_nbytes, dtype=torch.uint8) for _ in entries]
        assert all(outcome.is_hit for outcome in reader.get([entry.key for entry in entries], slots))
        summaries = reader.summaries("s", 0, len(entries))
        writer.create_stream(header)
        writer.append("s", list(map(NewBlock, entries, slots, summaries.values())), {"is_complete": True})


def test_questions_during_an_ingest_see_the_stream_as_it_is_at_that_moment(nursery: Nursery, tmp_path: Path) -> None:
    video, model, store = record_silently(tmp_path, 0.04), save_tiny_model(tmp_path / "model"), tmp_path / "store"
    writer = nursery.start("ingest", video, "--store", store, "--stream", "s", "--model", model)
    first_block = ("inspect", "--store", store, "--stream", "s", "--block", "0")
    writer.wait_until(lambda: nursery.run(*first_block).code == 0)
    seen = []
    for _ in range(MAX_ROUNDS):
        seen += answers(nursery, store, model)
        refused = nursery.run("ingest", video, "--store", store, "--stream", "t", "--model", model)
        if refused.code == 0:
            break  # the first writer is done
        refused.check_error(str(store), f"process {writer.pid} writes this store")
    assert writer.wait().code == 0
    lengths = sorted({answer["tokens_in_stream"] for answer in seen})
    last = answers(nursery, store, model)
    assert lengths[0] < last[0]["tokens_in_stream"], "no question was asked during the ingest"
    for length in lengths:
        copy_beginning(store, tmp_path / str(length), length)
        wanted = {answer["question"]: answer for answer in answers(nursery, tmp_path / str(length), model)}
        for answer in seen:
            if answer["tokens_in_stream"] == length:
                assert answer == wanted[answer["question"]]
