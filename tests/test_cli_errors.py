# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong, and what a machine can: one line on stderr, exit code 2, and nothing stored is harmed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

for _module in ("av", "PIL", "tesserocr", "transformers"):
    pytest.importorskip(_module)

from kvstore.cli.main import main  # noqa: E402
from kvstore.tiers.catalogue import Catalogue, Table  # noqa: E402
from tests.cli_runs import Done, record_silently, save_tiny_model  # noqa: E402

Command = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a recording, and `ingested`, a store with the complete stream `s`."""
    folder = tmp_path_factory.mktemp("errors")
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "other", seed=1)
    record_silently(folder, 0.02)
    assert main([str(word) for word in ingest_words(folder, folder / "ingested")]) == 0
    return folder


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be changed."""
    shutil.copytree(folder / "ingested", tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def run(*words: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def ingest_words(folder: Path, store: Path) -> tuple[str | Path, ...]:
    return ("ingest", folder / "silent.mp4", "--store", store, "--stream", "s", "--model", folder / "model")


def ask_words(folder: Path, store: Path) -> tuple[str | Path, ...]:
    return ("ask", "Where?", "--store", store, "--stream", "s", "--model", folder / "model")


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own, or a skipped test."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this user cannot mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def text_file(path: Path) -> Path:
    path.write_text("These are words.\n" * 1000)
    return path


def empty_file(path: Path) -> Path:
    path.touch()
    return path


def beginning_of_a_video(path: Path) -> Path:
    """The header of a container, and no frame."""
    path.write_bytes(b"\0\0\0\x1cftypisom\0\0\x02\0isomiso2mp41" + b"\0\0\0\x08free")
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path, "no such file"),
        (lambda path: path.parent, "not a file"),
        (empty_file, "the file is empty"),
        (text_file, "video"),
        (beginning_of_a_video, "video"),
    ],
    ids=["missing", "folder", "empty", "text", "no-frames"],
)
def test_ingest_refuses_what_is_no_video_and_makes_no_store(
    make: Callable[[Path], Path], reason: str, folder: Path, tmp_path: Path, command: Command
) -> None:
    video = make(tmp_path / "input.mp4")
    words = ("--store", tmp_path / "store", "--stream", "s", "--model", folder / "model")
    command("ingest", video, *words).check_error(str(video), reason)
    assert not (tmp_path / "store").exists()


def test_commands_name_the_streams_that_are_there(folder: Path, store: Path, command: Command) -> None:
    for words in (("ask", "Where?"), ("inspect",), ("verify",), ("rm",)):
        done = command(*words, "--store", store, "--stream", "lecture")
        done.check_error(str(store), "no stream 'lecture'", "the store holds 's'")


def test_reading_commands_make_no_store(folder: Path, tmp_path: Path, command: Command) -> None:
    for words in (("ls",), ("verify",), ("rm", "--stream", "s"), ("inspect", "--stream", "s")):
        command(*words, "--store", tmp_path / "store").check_error("no store here", "kvstore ingest")
    command(*ask_words(folder, tmp_path / "store")).check_error("no store here")
    assert not (tmp_path / "store").exists()
    command("ls", "--store", tmp_path).check_error("no store here")


def test_unknown_policies_are_listed_with_the_known(folder: Path, store: Path, command: Command) -> None:
    for words in (ask_words(folder, store), ingest_words(folder, store)):
        command(*words, "--policy", "magic").check_error("'magic'", "maxsim", "rekv")


def test_what_is_no_model_is_refused(folder: Path, store: Path, tmp_path: Path, command: Command) -> None:
    for model in (tmp_path / "none", tmp_path, text_file(tmp_path / "words.gguf")):
        command(*ask_words(folder, store)[:-1], model).check_error(str(model))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("", "not a JSON file"),
        ("{", "not a JSON file"),
        ("\xff", "not a JSON file"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": "kvstore-test"}', "kvstore-test"),
        ('{"model_type": "vit"}', "transformers cannot load it"),
    ],
)
def test_a_model_with_a_broken_config_is_refused(
    config: str, reason: str, folder: Path, store: Path, tmp_path: Path, command: Command
) -> None:
    model = tmp_path / "broken"
    shutil.copytree(folder / "model", model)
    (model / "config.json").write_text(config, encoding="latin-1")
    done = command(*ask_words(folder, store)[:-1], model)
    done.check_error(str(model), reason)
    assert len(done.err) < 500 + len(str(model))


def test_a_model_with_broken_weights_is_refused(folder: Path, store: Path, tmp_path: Path, command: Command) -> None:
    model = tmp_path / "broken"
    shutil.copytree(folder / "model", model)
    (model / "model.safetensors").write_bytes(b"no weights" * 10)
    command(*ask_words(folder, store)[:-1], model).check_error(str(model), "transformers cannot load it")


def test_another_model_is_refused(folder: Path, store: Path, command: Command) -> None:
    for words in (ask_words(folder, store), ingest_words(folder, store)):
        done = command(*words[:-1], folder / "other")
        done.check_error("'s' was written by another model", "revision", "--model")


def test_other_settings_are_refused_for_a_stream_that_exists(folder: Path, store: Path, command: Command) -> None:
    command(*ingest_words(folder, store), "--fps", "2").check_error("'s'", "fps", "kvstore rm")
    command(*ingest_words(folder, store), "--profile", "q8").check_error("'s'", "profile")
    command(*ingest_words(folder, store), "--policy", "infllm").check_error("'s'", "prefill")


def test_a_newer_store_is_refused(folder: Path, store: Path, command: Command) -> None:
    catalogue = Catalogue(store / "catalogue", writable=True, durable=False)
    with catalogue.read() as view:
        value = view.get(Table.META, b"format")
    assert value is not None
    newer = value[:4] + (int.from_bytes(value[4:6], "little") + 1).to_bytes(2, "little") + value[6:]
    catalogue.write(lambda view: view.put(Table.META, b"format", newer))
    catalogue.close()
    for words in (("ls",), ("verify",), ("inspect", "--stream", "s"), ("rm", "--stream", "s")):
        command(*words, "--store", store).check_error("format", "upgrade kvstore")
    command(*ask_words(folder, store)).check_error("format", "upgrade kvstore")
    command(*ingest_words(folder, store)).check_error("format", "upgrade kvstore")


def test_a_block_that_is_not_there_is_refused(store: Path, command: Command) -> None:
    words = ("inspect", "--store", store, "--stream", "s", "--block", "999")
    command(*words).check_error("'s'", "there is no block 999")


def test_a_damaged_block_is_named_and_the_answer_still_comes(folder: Path, store: Path, command: Command) -> None:
    block = json.loads(command("inspect", "--store", store, "--stream", "s", "--block", "7", "--json").out)
    (extents,) = (store / "extents").glob(f"*{block['file']:x}*") if block["file"] else (store / "extents").iterdir()
    with extents.open("r+b") as file:
        file.seek(block["offset"] + block["extent_nbytes"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0xFF]))
    asked = command(*ask_words(folder, store), "--budget", "4000", "--json")
    assert asked.code == 0
    assert asked.err.startswith("kvstore: warning: not attended to: block 7, 0:0")
    assert asked.err.count("\n") == 1
    answer = json.loads(asked.out)
    assert answer["tokens_attended"] > 0
    assert len(answer["damaged"]) == 1
    verified = command("verify", "--store", store, "--json")
    assert verified.code == 1
    (fault,) = json.loads(verified.out)["damaged"]
    assert (fault["stream"], fault["index"], fault["start_s"]) == ("s", 7, block["start_s"])
    told = command("verify", "--store", store, "--stream", "s")
    assert told.code == 1
    assert told.out.startswith("damaged: stream s, block 7, 0:0")
    assert "1 damaged block: " in told.out


def check_full(done: Done, store: Path) -> None:
    """The store is full: one line says what to do, and what is stored is sound."""
    assert (done.code, done.out) == (2, ""), done
    assert done.err.splitlines()[-1].startswith("kvstore: error: "), done.err
    assert "Traceback" not in done.err
    for part in (
        str(store),
        "of the video is stored and can be asked",
        "with more room the same command goes on from there",
    ):
        assert part in done.err.splitlines()[-1]


def test_a_full_budget_harms_nothing_and_more_room_resumes(folder: Path, tmp_path: Path, command: Command) -> None:
    store = tmp_path / "store"
    needed = json.loads(command("ls", "--store", folder / "ingested", "--json").out)[0]["nbytes"]
    catalogue_nbytes = (folder / "ingested" / "catalogue" / "data.mdb").stat().st_size
    budget = catalogue_nbytes + needed // 2
    check_full(command(*ingest_words(folder, store), "--disk", str(budget)), store)
    assert command("verify", "--store", store).code == 0
    assert command(*ask_words(folder, store)).code == 0
    assert command(*ingest_words(folder, store), "--disk", "64MiB").code == 0
    assert json.loads(command("ls", "--store", store, "--json").out)[0]["nbytes"] == needed


def test_a_full_disk_harms_nothing_and_more_room_resumes(folder: Path, tmp_path: Path, command: Command) -> None:
    with small_disk(tmp_path / "disk", 336 << 10) as disk:
        store = disk / "store"
        check_full(command(*ingest_words(folder, store)), store)
        assert command("verify", "--store", store).code == 0
        assert command(*ask_words(folder, store)).code == 0
        remount(disk, "size=64m")
        assert command(*ingest_words(folder, store)).code == 0
        assert command("verify", "--store", store).code == 0


def test_a_read_only_file_system_can_be_asked_and_not_written(folder: Path, tmp_path: Path, command: Command) -> None:
    with small_disk(tmp_path / "disk", 64 << 20) as disk:
        store = disk / "store"
        shutil.copytree(folder / "ingested", store)
        remount(disk, "ro")
        command(*ingest_words(folder, store)).check_error(str(store), "Read-only file system")
        command(*ingest_words(folder, disk / "new")).check_error(str(disk / "new"), "Read-only file system")
        command("rm", "--store", store, "--stream", "s").check_error(str(store), "Read-only file system")
        assert command(*ask_words(folder, store)).code == 0
        assert command("verify", "--store", store).code == 0


@pytest.mark.parametrize("store", ["/proc/kvstore", "/dev/null", "/dev/null/store"])
def test_a_place_that_cannot_be_a_store_is_refused(store: str, folder: Path, command: Command) -> None:
    command(*ingest_words(folder, Path(store))).check_error(store)
    command("ls", "--store", store).check_error(store)
