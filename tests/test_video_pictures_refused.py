# SPDX-License-Identifier: Apache-2.0
"""Ingests that would not go on as they began, and models that cannot see, are refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for _module in ("av", "PIL", "tesserocr", "faster_whisper", "transformers"):
    pytest.importorskip(_module)

from kvstore.engines.loading import LanguageModel  # noqa: E402
from kvstore.engines.pictures import FAMILIES, PictureMaker  # noqa: E402
from kvstore.errors import ConfigError, CorruptRecordError, MissingDependencyError  # noqa: E402
from kvstore.store import Access, Durability, Store, StreamHeader  # noqa: E402
from kvstore.video import ingest as ingesting  # noqa: E402
from kvstore.video.assets import WHISPER_TINY_EN  # noqa: E402
from kvstore.video.ingest import IngestConfig, ingest  # noqa: E402
from tests.seen_videos import ALL, PLAIN, Speaker, film, load, silently  # noqa: E402
from tests.tiny_vision_models import save_vision_model  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    for family in ("qwen2_vl", "llava_onevision", "smolvlm"):
        save_vision_model(folder / family, family)
    film(folder / "film.mkv")
    film(folder / "spoken.mkv", has_sound=True)
    return folder


def test_a_picture_larger_than_the_window_names_the_setting_and_stores_nothing(folders: Path, tmp_path: Path) -> None:
    config = IngestConfig(window_tokens=15, block_tokens=8)
    with pytest.raises(ConfigError, match="set window_tokens to 16 or more"):
        ingest(folders / "film.mkv", tmp_path / "store", "s", load(folders / "llava_onevision"), config, silently)
    assert not (tmp_path / "store").exists()


def test_a_stream_of_pictures_goes_on_with_the_same_eyes_only(folders: Path, tmp_path: Path) -> None:
    video = folders / "film.mkv"
    ingest(video, tmp_path, "s", load(folders / "qwen2_vl"), PLAIN, silently)
    other = load(folders / "qwen2_vl")
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ConfigError, match="another reader of frames"):
        ingest(video, tmp_path, "s", other, PLAIN, silently)
    blind = LanguageModel(other.model, other.tokenizer, other.path)
    with pytest.raises(ConfigError, match=r"another reader of frames \(Qwen2VLImageProcessorPil .*tesseract"):
        ingest(video, tmp_path, "s", blind, IngestConfig(window_tokens=ALL, block_tokens=64), silently)
    with torch.no_grad():
        other.model.model.visual.patch_embed.proj.weight.add_(1.0)
    assert names_of(other) != names_of(load(folders / "qwen2_vl")), "another vision tower sees other things"
    assert names_of(load(folders / "qwen2_vl")) == names_of(load(folders / "qwen2_vl"))


def test_a_stream_with_speech_goes_on_with_the_same_ears_only(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingesting, "Transcriber", Speaker)
    monkeypatch.setattr(ingesting, "fetch", lambda asset: Path(asset.package))
    ingest(folders / "spoken.mkv", tmp_path, "s", load(folders / "smolvlm"), PLAIN, silently)
    monkeypatch.setattr(ingesting, "WHISPER_TINY_EN", replace(WHISPER_TINY_EN, version="0.2.0"))
    with pytest.raises(ConfigError, match=r"another writer of speech .* 0\.2\.0, faster-whisper"):
        ingest(folders / "spoken.mkv", tmp_path, "s", load(folders / "smolvlm"), PLAIN, silently)


def names_of(language_model: LanguageModel) -> str:
    return PictureMaker(language_model.model, language_model.image_processor, language_model.encode, 64).name


@pytest.mark.parametrize(
    "cursor",
    [
        {"next_s": "soon"},
        {"next_s": math.pi, "next_group": "two"},
        {"next_s": "inf"},
        {"next_s": "nan"},
        {"next_s": None},
        {"next_s": -1.0},
        {"next_s": [2]},
        {"next_s": 10**400},
        {"next_s": 2.0, "next_group": -1},
        {"next_s": 2.0, "next_group": 1.5},
    ],
)
def test_a_cursor_that_says_nothing_is_refused_by_name(cursor: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    video, language_model = folders / "film.mkv", load(folders / "smolvlm")
    ingest(video, tmp_path / "whole", "s", language_model, PLAIN, silently)
    with Store.open(tmp_path / "whole", access=Access.READ) as listing:
        header: StreamHeader = listing.manifest("s").header
    with Store.open(
        tmp_path / "broken", access=Access.WRITE, layout=header.layout, durability=Durability.NONE
    ) as store:
        store.create_stream(header)
        store.append("s", [], cursor)
    with pytest.raises(CorruptRecordError, match="stream 's': its cursor"):
        ingest(video, tmp_path / "broken", "s", language_model, PLAIN, silently)


def test_a_frame_that_the_image_processor_refuses_has_a_name(folders: Path) -> None:
    language_model = load(folders / "qwen2_vl")
    maker = PictureMaker(language_model.model, language_model.image_processor, language_model.encode, 64)
    with pytest.raises(ConfigError, match=r"cannot take a frame of 900 x 4: .*aspect ratio"):
        maker.picture(np.zeros((4, 900, 3), dtype=np.uint8))


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads((folder / name).read_text())
    change(found)
    (folder / name).write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("qwen2_vl", {"patch_size": 8}),
        ("llava_onevision", {"size": {"height": 8, "width": 8}}),
        ("smolvlm", {"max_image_size": {"longest_edge": 32}}),
    ],
)
def test_an_image_processor_of_another_tower_stores_nothing(
    family: str, setting: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    folder = save_vision_model(tmp_path / "model", family)
    edit(folder, "preprocessor_config.json", lambda found: found.update(setting))
    with pytest.raises(ConfigError, match="and the vision tower takes"):
        ingest(folders / "film.mkv", tmp_path / "store", "s", load(folder), PLAIN, silently)
    assert not (tmp_path / "store").exists()


def test_folders_that_cannot_see_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_vision_model(tmp_path / "model", "qwen2_vl")
    edit(folder, "preprocessor_config.json", lambda found: found.update(image_processor_type="Sam2ImageProcessor"))
    with pytest.raises(MissingDependencyError, match="pip install torchvision"):
        load(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="cannot load its image processor"):
        load(folder)
    edit(folder, "config.json", lambda found: found.update(model_type="llava"))
    with pytest.raises(ConfigError, match=f"vision tower of llava.*{', '.join(FAMILIES)}"):
        load(folder)
