# SPDX-License-Identifier: Apache-2.0
"""The kvstore command from end to end on a tiny model: what each command prints, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

for _module in ("av", "PIL", "tesserocr", "transformers"):
    pytest.importorskip(_module)

from kvstore.cli import streams  # noqa: E402
from kvstore.cli.interrupt import Interruptible  # noqa: E402
from kvstore.cli.main import main  # noqa: E402
from kvstore.store import FetchReport, FetchRequest, Outcome, Store  # noqa: E402
from tests.cli_runs import (  # noqa: E402
    ENVIRONMENT,
    Done,
    Nursery,
    open_nursery,
    record_silently,
    run_process,
    save_tiny_model,
)

Command = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "model")
    record_silently(folder, 0.03)
    return folder


@pytest.fixture(scope="module")
def nursery(folder: Path) -> Iterator[Nursery]:
    with open_nursery(folder) as nursery:
        nursery.run("--help")  # it is ready when this returns
        yield nursery


@pytest.fixture(scope="module")
def ingested(folder: Path, nursery: Nursery) -> Path:
    """A store with the complete stream `s`; not to be changed."""
    done = nursery.run(*ingest_words(folder, folder / "ingested"))
    assert done.code == 0, done.err
    return folder / "ingested"


@pytest.fixture
def store(ingested: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(ingested, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def run(*words: str | Path) -> Done:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def ingest_words(folder: Path, store: Path) -> tuple[str | Path, ...]:
    return ("ingest", folder / "silent.mp4", "--store", store, "--stream", "s", "--model", folder / "model")


def test_ingest_says_how_far_it_is_and_what_it_did(folder: Path, tmp_path: Path, nursery: Nursery) -> None:
    done = nursery.run(*ingest_words(folder, tmp_path / "store"), "--profile", "raw", "--fps", "0.5", "--disk", "1GiB")
    assert done.code == 0
    for part in ("100%", "frames/s", "tokens/s", "host ", "disk ", "ETA 0:00:00"):
        assert part in done.err.splitlines()[-1]
    assert done.out.startswith("s is complete: 0:0")
    assert "times real time" in done.out


def test_a_complete_stream_says_so(folder: Path, store: Path, command: Command) -> None:
    done = command(*ingest_words(folder, store))
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("s is complete already: ")


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(folder: Path, tmp_path: Path, nursery: Nursery) -> None:
    run = nursery.start(*ingest_words(folder, tmp_path / "store"))
    run.wait_until(lambda: "frames/s" in run.output.with_suffix(".err").read_text())
    run.signal(signal.SIGINT)
    stopped = run.wait()
    assert stopped.code == 130, stopped
    assert stopped.out == ""
    assert "kvstore: stopped; 0:0" in stopped.err.splitlines()[-1]
    assert "the same command goes on from there" in stopped.err
    listed = nursery.run("ls", "--store", tmp_path / "store")
    assert "resumable at 0:0" in listed.out
    asked = nursery.run("ask", "why?", "--store", tmp_path / "store", "--stream", "s", "--model", folder / "model")
    assert asked.code == 0
    assert asked.err.startswith("kvstore: note: the stream is not complete: read until 0:0")
    resumed = nursery.run(*ingest_words(folder, tmp_path / "store"))
    assert resumed.code == 0
    assert resumed.err.startswith("resumed at 0:0")


def test_ask_prints_answer_spans_and_times(folder: Path, ingested: Path, command: Command) -> None:
    done = command("ask", "Where?", "--store", ingested, "--stream", "s", "--model", folder / "model")
    assert (done.code, done.err) == (0, "")
    for part in ("attended", "score", "0:00:", "first token after", "retrieve", "bytes read: device", "by maxsim"):
        assert part in done.out, part


def test_ask_prints_one_json_object(folder: Path, ingested: Path, command: Command) -> None:
    done = command("ask", "Where?", "--store", ingested, "--stream", "s", "--model", folder / "model", "--json")
    answer = json.loads(done.out)
    assert answer["question"] == "Where?"
    assert isinstance(answer["answer"], str)
    assert answer["spans"], "random keys still rank"
    scores = [span["score"] for span in answer["spans"]]
    assert scores == sorted(scores, reverse=True)
    for span in answer["spans"]:
        assert span.keys() == {"start_s", "end_s", "score", "attended"}
        assert span["start_s"] < span["end_s"], "the preamble is no part of the video"
    assert answer["stages_s"].keys() == {"retrieve", "load", "decode", "attend"}
    assert answer["ttft_s"] == pytest.approx(sum(answer["stages_s"].values()), abs=0.01)
    assert answer["bytes_read"].keys() == {"device", "host", "disk", "remote"}
    assert answer["bytes_read"]["disk"] > 0
    assert 0 < answer["tokens_attended"] < answer["tokens_in_stream"]
    assert answer["policy"] == "maxsim"
    assert (answer["damaged"], answer["num_unsearched"]) == ([], 0)


def test_blocks_that_cannot_be_searched_are_counted(
    folder: Path, ingested: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Store.fetch

    def torn(self: Store, requests: list[FetchRequest], timeout_s: float | None = None) -> FetchReport:
        report = fetch(self, requests, timeout_s)
        for number, request in enumerate(requests):
            if request.layers is None:  # as blocks are read to be searched
                report.outcomes[number], report.reasons[number] = Outcome.DAMAGED, "its first plane is torn"
        return report

    monkeypatch.setattr(Store, "fetch", torn)
    words = ("ask", "Where?", "--store", ingested, "--stream", "s", "--model", folder / "model", "--policy", "rekv")
    answer = json.loads(command(*words, "--json").out)
    assert answer["num_unsearched"] == len(answer["damaged"]) > 9
    told = command(*words)
    assert told.out.splitlines()[-1] == f"{answer['num_unsearched']} blocks could not be searched: damaged"
    assert told.err.count("not attended to: block ") == 8
    assert told.err.splitlines()[8:] == [
        f"kvstore: warning: not attended to: {answer['num_unsearched'] - 8} more, which --json lists"
    ]


def test_a_larger_budget_attends_to_more(folder: Path, ingested: Path, command: Command) -> None:
    words = ("ask", "Where?", "--store", ingested, "--stream", "s", "--model", folder / "model", "--json")
    small, large = (json.loads(command(*words, "--budget", str(budget)).out) for budget in (128, 512))
    assert small["tokens_attended"] < large["tokens_attended"]


def test_ls_lists_streams(ingested: Path, command: Command) -> None:
    done = command("ls", "--store", ingested)
    assert done.out.splitlines()[0].split() == ["name", "model", "state", "duration", "tokens", "blocks", "size"]
    (line,) = json.loads(command("ls", "--store", ingested, "--json").out)
    assert (line["name"], line["is_complete"]) == ("s", True)
    assert f"{line['tokens']:,}" in done.out
    assert line["nbytes"] > 0


def test_inspect_shows_the_stream(ingested: Path, command: Command) -> None:
    words = ("inspect", "--store", ingested, "--stream", "s")
    shown = json.loads(command(*words, "--json").out)
    assert shown["spec"]["num_layers"] == 2
    assert shown["cursor"]["is_complete"] is True
    assert shown["source"]["file"] == "silent.mp4"
    assert shown["blocks"]["missing"] == 0
    assert shown["blocks"]["ratio"] > 1
    assert shown["fingerprint"] in command(*words).out


def test_inspect_shows_one_block(ingested: Path, command: Command) -> None:
    words = ("inspect", "--store", ingested, "--stream", "s", "--block", "6")
    shown = json.loads(command(*words, "--json").out)
    assert (shown["index"], shown["profile"]) == (6, "lossless")
    assert [(plane["plane"], plane["layer"]) for plane in shown["planes"]] == [("K", 0), ("V", 0), ("K", 1), ("V", 1)]
    assert sum(plane["raw_nbytes"] for plane in shown["planes"]) == shown["raw_nbytes"]
    assert shown["key"] in command(*words).out


def test_verify_finds_no_damage_where_there_is_none(ingested: Path, command: Command) -> None:
    whole = command("verify", "--store", ingested)
    assert whole.code == 0
    assert whole.out.startswith("no damage: ")
    assert "100%" in whole.err
    one = command("verify", "--store", ingested, "--stream", "s", "--json")
    assert one.code == 0
    assert json.loads(one.out)["is_clean"] is True


def test_rm_says_what_was_freed(store: Path, command: Command) -> None:
    nbytes = json.loads(command("ls", "--store", store, "--json").out)[0]["nbytes"]
    done = command("rm", "--store", store, "--stream", "s")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("removed s: ")
    assert done.out.endswith(f"; {nbytes / 1024:.1f} KiB freed\n")
    assert command("ls", "--store", store).out == "no streams\n"
    assert command("ls", "--store", store, "--json").out == "[]\n"


def test_the_module_runs_as_a_program(ingested: Path) -> None:
    done = run_process("ls", "--store", ingested)
    assert (done.code, done.err) == (0, "")
    assert "complete" in done.out
    run_process("ls", "--store", ingested / "nowhere").check_error("nowhere: no store here")


def test_a_reader_that_has_seen_enough_is_no_error(ingested: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "kvstore", "ls", "--store", str(ingested)]
    with os.fdopen(writing, "wb") as pipe:
        run = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False)
    assert (run.returncode, run.stderr) == (141, b"")


def test_ctrl_c_ends_a_command_that_keeps_nothing(
    command: Command, ingested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(options: Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(streams, "run", interrupted)
    assert command("ls", "--store", ingested) == Done(130, "", "kvstore: interrupted\n")


def test_an_unexpected_error_keeps_its_traceback(
    command: Command, ingested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(options: Namespace) -> int:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(streams, "run", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        command("ls", "--store", ingested)


def test_the_first_ctrl_c_waits_and_the_second_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruptible() as interruptible:
        interruptible.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interruptible.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    told = capfd.readouterr().err
    assert all(words in told for words in ("after this screen", "step of calibrating", "Ctrl-C again stops at once"))
