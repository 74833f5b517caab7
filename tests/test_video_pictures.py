# SPDX-License-Identifier: Apache-2.0
"""Ingest and ask with vision-language models: frames become blocks of visual tokens, and nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

for _module in ("av", "PIL", "tesserocr", "faster_whisper", "transformers"):
    pytest.importorskip(_module)

from transformers import DynamicCache  # noqa: E402

from kvstore.cli.main import main  # noqa: E402
from kvstore.engines.anatomy import decoder_of  # noqa: E402
from kvstore.engines.loading import LanguageModel  # noqa: E402
from kvstore.engines.pictures import PictureMaker  # noqa: E402
from kvstore.video import ingest as ingesting  # noqa: E402
from kvstore.video.ask import Asker  # noqa: E402
from kvstore.video.ingest import IngestConfig, ingest  # noqa: E402
from kvstore.video.perception import Observation, perceive  # noqa: E402
from kvstore.video.senses import PictureTaker, prompts_of  # noqa: E402
from tests.seen_videos import (  # noqa: E402
    ALL,
    PLAIN,
    SCENE_S,
    SCENES,
    WORDS,
    Speaker,
    entries_and_bytes,
    film,
    load,
    silently,
)
from tests.tiny_vision_models import VISION_FAMILIES, save_vision_model  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<begin>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<stop>\n"
    "{% endfor %}{% if add_generation_prompt %}<begin>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    for family in VISION_FAMILIES:
        save_vision_model(folder / family, family)
    film(folder / "film.mkv")
    film(folder / "spoken.mkv", has_sound=True)
    return folder


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingesting, "Transcriber", Speaker)
    monkeypatch.setattr(ingesting, "fetch", lambda asset: Path(asset.package))


def asked(store: Path, language_model: LanguageModel, question: str) -> tuple[list[Tensor], Any]:
    """Logits of the prompt and of each decoding step, and the answer."""
    logits: list[Tensor] = []
    with Asker(store, "s", language_model, budget_tokens=ALL) as asker:
        handle = language_model.model.register_forward_hook(
            lambda module, args, output: logits.append(output.logits[0, -1])
        )
        answer = asker.ask(question, max_new_tokens=3)
        handle.remove()
    return logits, answer


def observations(video: Path, language_model: LanguageModel, config: IngestConfig) -> list[Observation]:
    """What an ingest perceives."""
    encode = language_model.encode
    maker = PictureMaker(
        language_model.model, language_model.image_processor, encode, config.block_tokens - len(encode("\n[0:00:10] "))
    )
    return list(perceive(video, PictureTaker(maker), listener=Speaker(video)))


def sequence_of(language_model: LanguageModel, seen: list[Observation], question: str) -> list[tuple[list[int], bool]]:
    """The whole stream and a question, forward by forward: token ids, and whether a picture is among them."""
    encode, prompts = language_model.encode, prompts_of(language_model)
    parts = [(encode(prompts.preamble), False)]
    for each in seen:
        assert each.picture is not None
        parts.append(([*encode(f"\n[0:00:{each.start_s:02.0f}] "), *each.picture.ids], True))
        if each.text:
            parts.append((encode(f"\n{each.text}\n"), False))
    return [*parts, (encode(prompts.question(question)), False)]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_command_ingests_frames_and_cites_them(
    family: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ("--store", str(tmp_path), "--stream", "s", "--model", str(folders / family))
    assert main(["ingest", str(folders / "film.mkv"), *store]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["ask", "What is shown?", *store, "--budget", "10000", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    spans = sorted((span["start_s"], span["end_s"]) for span in answer["spans"])
    assert spans == [(SCENE_S * number, SCENE_S * (number + 1)) for number in range(len(SCENES))]
    assert answer["tokens_attended"] == answer["tokens_in_stream"] > 100
    assert answer["bytes_read"]["disk"] > 0
    assert answer["damaged"] == []
    entries, cursor, _ = entries_and_bytes(tmp_path)
    groups = [entry.group for entry in entries if entry.group >= 0]
    assert groups == list(range(len(SCENES))), "one block for every scene"
    assert cursor == {"next_s": 10.0, "next_group": 5, "is_complete": True}
    assert main(["inspect", "--store", str(tmp_path), "--stream", "s"]) == 0
    assert "ImageProcessor" in capsys.readouterr().out


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.usefixtures("speaker")
def test_answers_equal_the_engines_own_over_the_same_frames_and_words(
    family: str, folders: Path, tmp_path: Path
) -> None:
    """Bit for bit with the engine's cache in the same forwards; closely in one forward that counts by itself."""
    language_model = load(folders / family)
    ingest(folders / "spoken.mkv", tmp_path, "s", language_model, PLAIN, silently)
    logits, answer = asked(tmp_path, load(folders / family), "What is shown?")
    assert answer.tokens_attended == answer.tokens_in_stream

    engine: Any = load(folders / family).model
    seen = observations(folders / "spoken.mkv", language_model, PLAIN)
    assert [bool(each.text) for each in seen] == [False, True, False, False, False]
    pictures = [each.picture.inputs for each in seen if each.picture is not None]
    parts = sequence_of(language_model, seen, "What is shown?")
    ids = torch.tensor([[token for part, _ in parts for token in part]])
    whole = {name: torch.cat([inputs[name] for inputs in pictures]) for name in pictures[0]}
    positions = torch.arange(ids.shape[1])[None]
    if "qwen" in family:
        whole["mm_token_type_ids"] = (ids == engine.config.image_token_id).int()
        positions, _ = engine.model.get_rope_index(
            ids, whole["mm_token_type_ids"], image_grid_thw=whole["image_grid_thw"]
        )
    elif family == "smolvlm":  # pictures of one sequence lie side by side
        whole = {name: value.transpose(0, 1) for name, value in whole.items()}
    with torch.no_grad():
        assert torch.allclose(engine(input_ids=ids, **whole).logits[0, -1], logits[0], atol=1e-4, rtol=1e-4)
        own, first = DynamicCache(), 0
        for part, is_picture in parts[:-1]:
            where = positions[..., first : first + len(part)]
            first += len(part)
            if is_picture:
                engine(input_ids=torch.tensor([part]), position_ids=where, past_key_values=own, **pictures.pop(0))
            else:
                run_filled_up(decoder_of(engine), part, where, own)
        had: list[Tensor] = []
        step, where = ids[:, first:], positions[..., first:]
        while len(had) < len(logits):
            had.append(engine(input_ids=step, position_ids=where, past_key_values=own, logits_to_keep=1).logits[0, -1])
            step, where = had[-1].argmax().view(1, 1), where[..., -1:] + 1
    for one, other in zip(logits, had, strict=True):
        assert torch.equal(one, other)


def run_filled_up(decoder: Any, ids: list[int], where: Tensor, cache: DynamicCache) -> None:
    """Run words as an ingest does: filled up to a multiple of 64, and cut again."""
    spare = -len(ids) % 64
    more = where[..., -1:] + 1 + torch.arange(spare)
    decoder(
        input_ids=torch.tensor([ids + ids[-1:] * spare]),
        position_ids=torch.cat([where, more], dim=-1),
        past_key_values=cache,
        use_cache=True,
    )
    if spare:
        cache.crop(-spare)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
@pytest.mark.usefixtures("speaker")
def test_an_ingest_that_fails_at_any_forward_is_resumed_to_the_same_stream(
    family: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speaker, "words", 2 * WORDS)
    config = IngestConfig(window_tokens=200, block_tokens=64, device_nbytes=16 << 20)
    video, language_model = folders / "spoken.mkv", load(folders / family)
    ingest(video, tmp_path / "unbroken", "s", language_model, config, silently)
    unbroken = entries_and_bytes(tmp_path / "unbroken")
    num_forwards = 0

    def count_down(*_: object) -> None:
        nonlocal num_forwards
        num_forwards -= 1
        if num_forwards < 0:
            raise InterruptedError

    decoder_of(language_model.model).register_forward_pre_hook(count_down)
    for forwards in range(1, 30):
        num_forwards = forwards
        try:
            ingest(video, tmp_path / str(forwards), "s", language_model, config, silently)
        except InterruptedError:
            num_forwards = ALL
            ingest(video, tmp_path / str(forwards), "s", load(folders / family), config, silently)
            assert entries_and_bytes(tmp_path / str(forwards)) == unbroken
        else:
            break
    assert forwards == 1 + len(SCENES) + 2, "the words of the second scene take two forwards"


def test_a_picture_larger_than_a_block_is_cut_evenly(folders: Path, tmp_path: Path) -> None:
    config = IngestConfig(window_tokens=64, block_tokens=13)
    ingest(folders / "film.mkv", tmp_path, "s", load(folders / "llava_onevision"), config, silently)
    entries, _, _ = entries_and_bytes(tmp_path)
    sizes = [[entry.num_tokens for entry in entries if entry.group == group] for group in range(len(SCENES))]
    assert sizes == [[8, 8]] * len(SCENES), "16 tokens: 11 of the time and 5 of the picture"


def test_a_picture_that_can_shrink_fits_one_block(folders: Path, tmp_path: Path) -> None:
    config = IngestConfig(window_tokens=64, block_tokens=24)
    ingest(folders / "film.mkv", tmp_path, "s", load(folders / "qwen2_vl"), config, silently)
    entries, _, _ = entries_and_bytes(tmp_path)
    assert [entry.group for entry in entries if entry.group >= 0] == list(range(len(SCENES)))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_equal_frames_are_named_alike_and_others_are_not(family: str, folders: Path, tmp_path: Path) -> None:
    """The same film twice has the same keys; scenes that differ part ways from there on."""
    keys = []
    film(tmp_path / "other.mkv", (1, 5))
    for number, video in enumerate((folders / "film.mkv", folders / "film.mkv", tmp_path / "other.mkv")):
        ingest(video, tmp_path / str(number), "s", load(folders / family), PLAIN, silently)
        entries, _, _ = entries_and_bytes(tmp_path / str(number))
        keys.append({entry.group: entry.key for entry in entries})
    assert keys[0] == keys[1]
    assert keys[0][0] == keys[2][0]
    assert keys[0][1] != keys[2][1]
    assert len(set(keys[0].values())) == len(keys[0])


def test_a_model_with_a_chat_format_is_spoken_to_in_it(folders: Path, tmp_path: Path) -> None:
    language_model = load(save_vision_model(tmp_path / "chat", "qwen2_vl", TEMPLATE))
    prompts = prompts_of(language_model)
    assert prompts.preamble.startswith("<begin>user\nThese are pictures")
    assert prompts.question(" Where? ") == "\nWhere?<stop>\n<begin>assistant\n"
    ingest(folders / "film.mkv", tmp_path / "store", "s", language_model, PLAIN, silently)
    _, answer = asked(tmp_path / "store", language_model, "What is shown?")
    assert len(answer.spans) == len(SCENES)
    for broken in ("{{ nothing.at.all }}", "no words"):
        language_model.tokenizer.chat_template = broken
        assert prompts_of(language_model).question("Where?") == "\nQuestion: Where?\nAnswer:"
