# SPDX-License-Identifier: Apache-2.0
"""`kvstore calibrate`, and every lossy profile from ingest to rm, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

for _module in ("av", "PIL", "tesserocr", "transformers"):
    pytest.importorskip(_module)

from kvstore.calibration import MIN_TOKENS  # noqa: E402
from kvstore.cli import progress  # noqa: E402
from kvstore.cli.main import main  # noqa: E402
from kvstore.engines.calibrating import NEEDED_TOKENS  # noqa: E402
from kvstore.record import Profile  # noqa: E402
from kvstore.store import Access, Store  # noqa: E402
from tests.cli_runs import Done, record_silently, save_tiny_model  # noqa: E402

Command = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes, a recording with more words than a calibration takes, and a text."""
    folder = tmp_path_factory.mktemp("calibrate")
    save_tiny_model(folder / "model")
    record_silently(folder, 0.055)
    (folder / "words.txt").write_text("It is a list of words, and it goes on. " * (NEEDED_TOKENS // 38 + 1))
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def run(*words: str | Path) -> Done:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def _ingest(command: Command, folder: Path, store: Path, profile: Profile) -> str:
    """Ingest the recording; returns what was said meanwhile."""
    video = folder / "silent.mp4"
    words = ("--store", store, "--stream", "s", "--model", folder / "model", "--profile", profile)
    done = command("ingest", video, *words)
    assert done.code == 0, done.err
    return done.err


def _block(command: Command, store: Path, index: int) -> dict[str, object]:
    shown: dict[str, object] = json.loads(
        command("inspect", "--store", store, "--stream", "s", "--block", str(index), "--json").out
    )
    return shown


@pytest.fixture(scope="module")
def exact(folder: Path) -> Path:
    """A store with a lossless stream; not to be changed."""
    words = ("--store", folder / "exact", "--stream", "s", "--model", folder / "model")
    assert main([str(word) for word in ("ingest", folder / "silent.mp4", *words)]) == 0
    return folder / "exact"


@pytest.mark.parametrize(
    "profile",
    [
        profile if profile is Profile.Q4 else pytest.param(profile, marks=pytest.mark.slow)
        for profile in Profile
        if profile is not Profile.LOSSLESS  # as in every other test of the command
    ],
)
def test_every_profile_goes_all_the_way(
    command: Command, folder: Path, tmp_path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    store = tmp_path / "store"
    assert ("100%  calibrating" in _ingest(command, folder, store, profile)) == profile.is_lossy
    assert command("verify", "--store", store).code == 0
    asked = command("ask", "Which word?", "--store", store, "--stream", "s", "--model", folder / "model", "--json")
    assert asked.code == 0, asked.err
    assert json.loads(asked.out)["damaged"] == []
    shown = json.loads(command("inspect", "--store", store, "--stream", "s", "--json").out)
    assert shown["profile"] == profile
    assert (shown["calibration"] is not None) == profile.is_lossy
    first, last = (_block(command, store, index) for index in (0, shown["blocks"]["count"] - 1))
    assert (first["profile"], last["profile"]) == (profile, profile)
    assert first["calibration"] is None
    assert (last["calibration"] is not None) == profile.is_lossy
    if profile.is_lossy:
        # Made from the first words, by the model that read them.
        assert shown["calibration"]["source"] == "the first words read"
        assert shown["calibration"]["object"] == last["calibration"]
        assert shown["calibration"]["divergence"] is not None
    assert command("rm", "--store", store, "--stream", "s").code == 0
    assert command("verify", "--store", store).code == 0


def test_calibrates_from_a_text_before_anything_is_stored(command: Command, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    source = ("--text", folder / "words.txt", "--bases")
    done = command("calibrate", "--store", store, *source, "--model", folder / "model", "--json")
    assert done.code == 0, done.err
    shown = json.loads(done.out)
    assert shown["source"] == "words.txt"
    assert shown["tokens"] == MIN_TOKENS
    assert set(shown["divergence"]) == {"q8", "q4", "q3", "q2", "pca"}
    with Store.open(store, access=Access.READ) as opened:
        ((fingerprint, decision),) = opened.calibrations.all()
    assert (fingerprint, decision.calibration.hex()) == (shown["model"], shown["calibration"])
    # What is coded in bases by now stays so when the model is calibrated again.
    done = command("calibrate", "--store", store, *source[:2], "--model", folder / "model", "--json")
    assert "pca" in json.loads(done.out)["divergence"]


def test_bases_for_more_channels_than_one_holds_are_refused(command: Command, folder: Path, tmp_path: Path) -> None:
    source = ("--text", folder / "words.txt", "--bases")
    model = save_tiny_model(tmp_path / "wide", head_dim=1026)
    done = command("calibrate", "--store", tmp_path / "store", *source, "--model", model)
    done.check_error("--bases", "1,026 channels", "1,024")
    assert not (tmp_path / "store").exists()


def test_calibrates_from_an_exact_stream_and_from_the_same_words_of_its_video(
    command: Command, folder: Path, exact: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(exact, store)
    found = {}
    for source in (("--stream", "s"), ("--video", folder / "silent.mp4")):
        done = command("calibrate", "--store", store, *source, "--model", folder / "model")
        assert done.code == 0, done.err
        assert done.out.startswith("calibrated llama 2x1x16 bfloat16 from 4,")
        assert [line.split()[0] for line in done.out.splitlines()[3:]] == ["q8", "q4", "q3", "q2"]
        with Store.open(store, access=Access.READ) as opened:
            ((_, found[source[0]]),) = opened.calibrations.all()
    assert found["--stream"].source == "stream s"
    assert found["--video"].source == "silent.mp4"
    assert command("verify", "--store", store).code == 0


def test_says_what_is_wrong_with_a_source(command: Command, folder: Path, exact: Path, tmp_path: Path) -> None:
    model = ("--model", folder / "model")
    (tmp_path / "short.txt").write_text("few words")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for words, parts in (
        (("--text", tmp_path / "short.txt"), ("too few", f"{NEEDED_TOKENS:,}")),
        (("--text", tmp_path / "absent.txt"), ("absent.txt", "cannot be read")),
        (("--text", tmp_path / "binary"), ("binary", "UTF-8")),
        (("--video", tmp_path / "binary"), ("binary",)),
    ):
        command("calibrate", "--store", tmp_path / "store", *words, *model).check_error(*parts)
    command("calibrate", "--store", exact, "--stream", "other", *model).check_error("no stream 'other'")
    with pytest.raises(SystemExit):
        command("calibrate", "--store", exact, *model)


def test_a_calibration_that_fails_is_explained(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def out_of_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(torch.autograd, "grad", out_of_memory)
    source = ("--text", folder / "words.txt", "--model", folder / "model")
    done = command("calibrate", "--store", tmp_path / "store", *source)
    assert (done.code, done.out) == (2, "")
    told = done.err.splitlines()[-1]  # behind the progress
    assert told.startswith("kvstore: error: the model was not calibrated")
    assert told.endswith("tried to allocate 2 GiB")
