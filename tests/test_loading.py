# SPDX-License-Identifier: Apache-2.0
"""kvstore/engines/loading.py: GGUF files are converted once, silently; what cannot be read or written has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from kvstore.engines.loading import load_model  # noqa: E402
from kvstore.errors import ConfigError, StoreIOError  # noqa: E402

WIDTH = 32
WEIGHTS = {
    "token_embd": (8, WIDTH),
    "output_norm": (WIDTH,),
    "output": (8, WIDTH),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (16, WIDTH),
    "blk.0.attn_v": (16, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.ffn_gate": (WIDTH, WIDTH),
    "blk.0.ffn_up": (WIDTH, WIDTH),
    "blk.0.ffn_down": (WIDTH, WIDTH),
    "blk.0.ffn_norm": (WIDTH,),
}


MERGES = ["a b", "ab c"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A random Llama of one layer and eight tokens."""
    return write_gguf(tmp_path / "tiny.gguf", list(WEIGHTS))


def write_gguf(path: Path, weights: list[str], merges: list[str] = MERGES, eos: int = 5) -> Path:
    """Write such a model, or parts of it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdef", "ab", "abc"])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(4)
    writer.add_eos_token_id(eos)
    random = np.random.default_rng(0)
    for name in weights:
        writer.add_tensor(f"{name}.weight", random.normal(size=WEIGHTS[name]).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once_and_silently(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = load_model(tiny, tmp_path / "converted")
    assert capfd.readouterr() == ("", "")
    (kept,) = (tmp_path / "converted").iterdir()
    made = (kept / "model.safetensors").stat().st_mtime_ns
    again = load_model(tiny, tmp_path / "converted")
    assert (kept / "model.safetensors").stat().st_mtime_ns == made
    assert first.encode("abca") == again.encode("abca") == [7, 0]


def test_a_folder_for_converted_models_that_cannot_be_made_has_a_name(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreIOError, match="cannot keep the converted model"):
        load_model(tiny, tiny / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_damaged_gguf_file_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="not a GGUF file that transformers can load"):
        load_model(tiny, tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())


@pytest.mark.parametrize("broken", [{"merges": ["c d", "cd e"]}, {"merges": ["ab", "x"]}, {"eos": 99}])
def test_a_gguf_file_with_a_senseless_tokenizer_is_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", list(WEIGHTS), **broken)
    with pytest.raises(ConfigError, match="not a GGUF file that transformers can load"):
        load_model(model, tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())


def test_a_gguf_file_without_some_weights_is_refused_except_where_they_are_tied(tmp_path: Path) -> None:
    without = {gone: [name for name in WEIGHTS if name != gone] for gone in ("output", "blk.0.attn_q")}
    tied = load_model(write_gguf(tmp_path / "tied.gguf", without["output"]), tmp_path / "converted").model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    with pytest.raises(ConfigError, match=r"incomplete, 1 weights are missing, e.g. model.layers.0.self_attn.q_proj"):
        load_model(write_gguf(tmp_path / "less.gguf", without["blk.0.attn_q"]), tmp_path / "converted")
    assert len(list((tmp_path / "converted").iterdir())) == 1


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"rms_norm_eps": "small"}),
        ("config.json", {"hidden_size": -1}),
        ("tokenizer.json", {"added_tokens": None}),
        ("tokenizer.json", {"truncation": {}}),
    ],
)
def test_a_folder_with_senseless_settings_is_refused(
    file: str, changes: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    load_model(tiny, tmp_path / "converted")
    (folder,) = (tmp_path / "converted").iterdir()
    settings = folder / file
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changes))
    with pytest.raises(ConfigError, match=r"transformers cannot load it: .*[^:]$"):
        load_model(folder, tmp_path / "converted")
