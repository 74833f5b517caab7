# SPDX-License-Identifier: Apache-2.0
"""An ingest is killed at random moments: the store is sound, and the next run ends where an unbroken one would."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

for _module in ("av", "PIL", "tesserocr", "transformers"):
    pytest.importorskip(_module)

from kvstore.cli.main import main  # noqa: E402
from kvstore.store import Access, Entry, Store  # noqa: E402
from tests.cli_runs import Nursery, open_nursery, record_silently, save_tiny_model  # noqa: E402

QUESTIONS = ("What is the colour of the garden gate?", "How are modules imported?")


@dataclass(frozen=True, slots=True)
class Contents:
    """All that a finished stream is: its manifest, its keys and values, what it answers."""

    entries: list[Entry]
    cursor: dict[str, Any]
    blocks: bytes
    answers: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Stage:
    """What the tests share: a recording, a model, a process that forks, and an ingest that nothing disturbed."""

    video: Path
    model: Path
    nursery: Nursery
    unbroken: Contents
    elapsed_s: float

    def ingest(self, store: Path) -> tuple[str | Path, ...]:
        """Arguments of the command."""
        return ("ingest", self.video, "--store", store, "--stream", "s", "--model", self.model)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("interrupted")
    video, model = record_silently(folder, 0.03), save_tiny_model(folder / "model")
    with open_nursery(folder) as nursery:
        nursery.run("--help")  # the nursery is ready when this returns
        began_s = time.monotonic()
        run = Stage(video, model, nursery, Contents([], {}, b"", []), 0.0)
        assert nursery.run(*run.ingest(folder / "unbroken")).code == 0
        elapsed_s = time.monotonic() - began_s
        yield Stage(video, model, nursery, contents(folder / "unbroken", model, nursery), elapsed_s)


def contents(store: Path, model: Path, nursery: Nursery) -> Contents:
    """Read a finished stream."""
    answers = []
    for question in QUESTIONS:
        asked = nursery.run("ask", question, "--store", store, "--stream", "s", "--model", model, "--json")
        assert (asked.code, asked.err) == (0, "")
        answers.append({k: v for k, v in json.loads(asked.out).items() if k not in ("ttft_s", "stages_s", "index_s")})
    with Store.open(store, access=Access.READ) as listing:
        header = listing.manifest("s").header
    with Store.open(store, access=Access.READ, layout=header.layout, host_nbytes=1 << 20) as reader:
        manifest = reader.manifest("s")
        slots = [torch.zeros(header.layout.slot_nbytes, dtype=torch.uint8) for _ in manifest.entries]
        outcomes = reader.get([entry.key for entry in manifest.entries], slots)
    assert all(outcome.is_hit for outcome in outcomes)
    blocks = b"".join(slot.numpy().tobytes() for slot in slots)
    return Contents(list(manifest.entries), manifest.cursor, blocks, answers)


def kill_and_resume(stage: Stage, store: Path, moment_s: float, capsys: pytest.CaptureFixture[str]) -> None:
    run = stage.nursery.start(*stage.ingest(store))
    time.sleep(moment_s)  # no event marks a random moment
    run.signal(signal.SIGKILL)
    killed = run.wait()
    assert killed.code in (-signal.SIGKILL, 0), killed.err
    code = main(["verify", "--store", str(store)])
    said = capsys.readouterr()
    assert code == 0 or "no store here" in said.err, said
    resumed = stage.nursery.run(*stage.ingest(store))
    assert resumed.code == 0, resumed.err
    found = contents(store, stage.model, stage.nursery)
    assert found.entries == stage.unbroken.entries
    assert found.cursor == stage.unbroken.cursor
    assert found.blocks == stage.unbroken.blocks, "keys or values differ"
    assert found.answers == stage.unbroken.answers
    assert main(["verify", "--store", str(store)]) == 0
    capsys.readouterr()


def kill_at_moments(stage: Stage, folder: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Kill once in each of `count` equal parts of the time that an unbroken ingest takes."""
    rng = random.Random()
    for part in range(count):
        moment_s = (part + rng.random()) / count * stage.elapsed_s
        kill_and_resume(stage, folder / f"killed-after-{moment_s:.3f}s", moment_s, capsys)


def test_a_stream_holds_the_preamble_and_then_the_screens_and_no_filler(stage: Stage) -> None:
    groups = [entry.group for entry in stage.unbroken.entries]
    assert groups == sorted(groups), "a block of no screen stands among the screens"
    assert all(entry.end_s > entry.start_s for entry in stage.unbroken.entries if entry.group >= 0)


def test_a_killed_ingest_is_resumed_to_the_same_stream(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at_moments(stage, tmp_path, 4, capsys)


@pytest.mark.slow
def test_an_ingest_killed_at_many_moments_is_resumed(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at_moments(stage, tmp_path, 20, capsys)


def test_an_ingest_killed_again_and_again_still_ends_at_the_same_stream(stage: Stage, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for part in range(1, 4):
        run = stage.nursery.start(*stage.ingest(store))
        time.sleep(stage.elapsed_s * part / 4)
        run.signal(signal.SIGKILL)
        run.wait()
    assert stage.nursery.run(*stage.ingest(store)).code == 0
    assert contents(store, stage.model, stage.nursery) == stage.unbroken
